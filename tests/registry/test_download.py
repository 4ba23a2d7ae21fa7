"""Files over HTTP: right however often they are cut off, within bounds, and never from another scheme."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from bdh_batch.errors import CheckpointError
from bdh_batch.registry import download
from bdh_batch.registry.download import Download, Downloads, Unfinished, plain
from bdh_batch.registry.files import Allowance
from tests.registry.web import Web, running

TLS = Path(__file__).parent.parent / "data" / "tls"
CONTENT = random.Random(7).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/big"
FAILURES = download.MOST_STALLED  # in a row, after which nothing is tried any more


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)


@pytest.fixture
def web() -> Iterator[Web]:
    with running() as web:
        web.files[PATH] = CONTENT
        yield web


def fetch(folder: Path, url: str, sha256: str | None = None, most: int = 10**9) -> bytes | None:
    with Downloads(folder) as downloads:
        found = downloads.fetch(Download(httpx.URL(url), "big", {}, sha256), Allowance(most))
        if found is None:
            return None
        content = found.path.read_bytes()
        assert (found.sha256, found.size) == (hashlib.sha256(content).hexdigest(), len(content))
        return content


def interrupted(folder: Path, url: str) -> Path:
    """Fetches the whole file, and is interrupted before that is used; where it lies."""
    downloads = Downloads(folder)
    found = downloads.fetch(Download(httpx.URL(url), "big", {}), Allowance(10**9))
    downloads.__exit__(KeyboardInterrupt)
    assert found is not None
    return found.path


def left(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_a_download_that_is_cut_off_at_three_places_goes_on_from_each(web: Web, tmp_path: Path) -> None:
    web.cuts[PATH] = [1000, 100_000, 5]
    assert fetch(tmp_path, web.url + PATH) == CONTENT
    asked = [headers.get("range") for headers in web.of(PATH)]
    assert asked == [None, "bytes=1000-", "bytes=101000-", "bytes=101005-"]
    assert web.sent == len(CONTENT)
    assert not left(tmp_path)


def test_a_later_attempt_goes_on_where_an_earlier_one_gave_up(web: Web, tmp_path: Path) -> None:
    web.cuts[PATH] = [200_000] + [0] * FAILURES
    with pytest.raises(Unfinished, match=r"the same command resumes after the 200,000 bytes"):
        fetch(tmp_path, web.url + PATH)
    assert left(tmp_path)
    assert fetch(tmp_path, web.url + PATH) == CONTENT
    assert web.sent == len(CONTENT)


def test_a_file_that_has_changed_is_fetched_anew(web: Web, tmp_path: Path) -> None:
    web.cuts[PATH] = [200_000] + [0] * FAILURES
    with pytest.raises(Unfinished):
        fetch(tmp_path, web.url + PATH)
    web.files[PATH] = CONTENT[::-1]
    assert fetch(tmp_path, web.url + PATH) == CONTENT[::-1]


@pytest.mark.parametrize("lacking", ["ranges", "etags"])
def test_a_server_that_cannot_resume_is_asked_for_the_whole(web: Web, tmp_path: Path, lacking: str) -> None:
    setattr(web, lacking, False)
    web.cuts[PATH] = [1000, 100_000, 5]
    assert fetch(tmp_path, web.url + PATH) == CONTENT


def test_a_known_checksum_makes_up_for_an_etag(web: Web, tmp_path: Path) -> None:
    web.etags = False
    web.cuts[PATH] = [1000, 100_000]
    assert fetch(tmp_path, web.url + PATH, SHA256) == CONTENT
    assert web.sent == len(CONTENT)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, len(CONTENT)), max_size=FAILURES - 1),
    statuses=st.lists(st.sampled_from([408, 429, 500, 503]), max_size=1),
    ranges=st.booleans(),
    etags=st.booleans(),
    known=st.booleans(),
)
def test_wherever_it_is_cut_off_the_file_is_right(
    web: Web,
    tmp_path: Path,
    cuts: list[int],
    statuses: list[int],
    ranges: bool,
    etags: bool,
    known: bool,
) -> None:
    web.ranges, web.etags, web.cuts[PATH], web.statuses[PATH] = ranges, etags, cuts[: FAILURES - 2], statuses
    assert fetch(tmp_path, web.url + PATH, SHA256 if known else None) == CONTENT
    assert not left(tmp_path)


def test_two_versions_are_never_mixed(web: Web, tmp_path: Path) -> None:
    """A server that forgets If-Range sends a part of another file."""
    web.etags = False
    web.cuts[PATH] = [1000] + [0] * FAILURES
    with pytest.raises(Unfinished):
        fetch(tmp_path, web.url + PATH, SHA256)
    web.files[PATH] = CONTENT[::-1]
    with pytest.raises(CheckpointError, match=f"{SHA256} was expected"):
        fetch(tmp_path, web.url + PATH, SHA256)
    assert not left(tmp_path)


def test_what_came_whole_is_asked_about_and_not_fetched_again(web: Web, tmp_path: Path) -> None:
    interrupted(tmp_path, web.url + PATH)
    assert fetch(tmp_path, web.url + PATH) == CONTENT
    assert web.sent == len(CONTENT)
    assert [("if-none-match" in headers) for headers in web.of(PATH)] == [False, True]


def test_what_is_damaged_on_the_disk_meanwhile_is_fetched_again(web: Web, tmp_path: Path) -> None:
    interrupted(tmp_path, web.url + PATH).write_bytes(b"?" + CONTENT[1:])
    assert fetch(tmp_path, web.url + PATH) == CONTENT


@pytest.mark.parametrize("lengths", [True, False])
def test_a_file_beyond_the_bound_is_refused(web: Web, tmp_path: Path, lengths: bool) -> None:
    web.lengths = lengths
    with pytest.raises(CheckpointError, match=r"big is too large: .* more than 1\.0 KiB \(--max-size\)"):
        fetch(tmp_path, web.url + PATH, most=1024)
    assert not left(tmp_path)


def test_a_wrong_checksum_leaves_nothing(web: Web, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{SHA256}, and {'0' * 64} was expected"):
        fetch(tmp_path, web.url + PATH, "0" * 64)
    assert not left(tmp_path)


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_not_there_is_none(web: Web, tmp_path: Path, status: int) -> None:
    web.statuses[PATH] = [status]
    assert fetch(tmp_path, web.url + PATH) is None
    assert not left(tmp_path)


@pytest.mark.parametrize("status", [401, 403, 418, 204])
def test_another_status_is_refused_at_once(web: Web, tmp_path: Path, status: int) -> None:
    web.statuses[PATH] = [status]
    with pytest.raises(CheckpointError, match=f"responds with {status}"):
        fetch(tmp_path, web.url + PATH)
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/big",
        "javascript:alert(1)",
        "data:,x",
        "gopher://127.0.0.1:1/",
        "http://[::",
    ],
)
def test_a_redirect_to_another_scheme_is_refused(web: Web, tmp_path: Path, target: str) -> None:
    web.redirects[PATH] = target
    with pytest.raises(CheckpointError, match=r"redirects|URL"):
        fetch(tmp_path, web.url + PATH)
    assert not left(tmp_path)


def test_a_redirect_out_of_tls_is_refused(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "cert.pem"))
    with running(TLS) as secure:
        secure.redirects["/here"] = web.url + PATH
        secure.files[PATH] = CONTENT
        assert fetch(tmp_path, secure.url + PATH) == CONTENT
        with pytest.raises(CheckpointError, match="redirects from https to http://127"):
            fetch(tmp_path, secure.url + "/here")


def test_redirects_are_followed_but_not_in_a_circle(web: Web, tmp_path: Path) -> None:
    web.redirects |= {"/a": "/b", "/b": PATH, "/round": "/round"}
    assert fetch(tmp_path, f"{web.url}/a") == CONTENT
    with pytest.raises(CheckpointError, match="redirects more than 10 times"):
        fetch(tmp_path, f"{web.url}/round")


def test_a_compressed_response_is_refused(web: Web, tmp_path: Path) -> None:
    web.encoding = "gzip"
    with pytest.raises(CheckpointError, match="compressed"):
        fetch(tmp_path, web.url + PATH)
    assert web.of(PATH)[0]["accept-encoding"] == "identity"


def test_where_nobody_listens_the_error_says_so(web: Web, tmp_path: Path) -> None:
    with pytest.raises(Unfinished, match="cannot be fetched"):
        fetch(tmp_path, "http://127.0.0.1:1/big")
    assert not left(tmp_path)


def test_a_file_that_does_not_fit_the_disk_is_refused_before_it_is_fetched(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"no room for the model: 293\.0 KiB are needed, and 1000 B are free"):
        fetch(tmp_path, web.url + PATH)
    assert not left(tmp_path)


def test_passwords_go_to_the_server_and_nowhere_else(web: Web, tmp_path: Path) -> None:
    url = web.url.replace("://", "://user:secret@") + PATH + "?token=secret"
    assert fetch(tmp_path, url) == CONTENT
    assert web.of(PATH)[0]["authorization"].startswith("Basic ")
    assert plain(httpx.URL(url)) == web.url + PATH
    web.statuses[PATH] = [403]
    with pytest.raises(CheckpointError) as error:
        fetch(tmp_path, url)
    assert "secret" not in str(error.value)
