"""The file of API keys: what is kept of a key, and who sees a change."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from bdh_batch import cli
from bdh_batch.errors import ConfigError
from bdh_batch.http.auth import keys
from bdh_batch.http.auth.keys import PREFIX, KeyFile, KeyRing, digest, new_key

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def add(path: Path, name: str, **rights: object) -> str:
    return KeyFile(path).add(partial(new_key, name=name, rights=rights))


def run(*arguments: object) -> int:
    return cli.main(["keys", *map(str, arguments)])


class TestCommands:
    def test_a_key_is_shown_once_and_kept_as_a_digest(self, path: Path, capsys: Captured) -> None:
        assert run("add", "--file", path, "--name", "team a", "--models", "m, n", "--weight", 2.5) == 0
        secret = capsys.readouterr().out.strip()
        assert secret.startswith("bdh-")
        assert len(secret) > 40
        assert secret not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert run("list", "--file", path) == 0
        listed = capsys.readouterr().out
        assert listed.startswith(digest(secret)[:16] + "  team a  ")
        assert "models=['m', 'n']  weight=2.5" in listed
        assert secret not in listed
        assert digest(secret) not in listed

    @pytest.mark.parametrize("by_name", [True, False])
    def test_a_revoked_key_is_gone_and_nothing_else(self, path: Path, capsys: Captured, by_name: bool) -> None:
        path.write_text("\ufeff# ours\nplain-key  # a note\n\n")
        add(path, "kept")
        secret = add(path, "gone", requests_per_minute=5)
        before = path.read_text()
        assert run("revoke", "--file", path, "gone" if by_name else digest(secret)[:16]) == 0
        assert path.read_text() == "".join(line for line in before.splitlines(True) if "gone" not in line)
        assert run("revoke", "--file", path, digest("plain-key")[:16]) == 0
        assert [key.name for key in KeyFile(path).read()] == ["kept"]
        assert "plain-key" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("add", "--name", "a"), "'a' already"),
            (("add", "--name", " "), "name: Input should not be empty"),
            (("add", "--name", "b", "--weight", "0"), "weight"),
            (("add", "--name", "b", "--requests-per-minute", "x"), "requests_per_minute"),
            (("revoke", "b"), "no key 'b'"),
            (("revoke", ""), "no key"),
        ],
    )
    def test_what_cannot_be_is_one_line(
        self, path: Path, capsys: Captured, arguments: tuple[str, ...], said: str
    ) -> None:
        path.write_text("plain-key\n")
        add(path, "a")
        before = path.read_text()
        assert run(*arguments, "--file", path) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert path.read_text() == before

    def test_the_file_is_that_of_the_settings(self, path: Path, capsys: Captured) -> None:
        assert run("add", "--name", "a", "--set", f"auth.api_keys_file={path}") == 0
        assert len(KeyFile(path).read()) == 1
        assert run("list") == 2
        assert "auth.api_keys_file" in capsys.readouterr().err

    def test_the_right_to_go_first_is_given_by_name(self, path: Path, capsys: Captured) -> None:
        assert run("add", "--file", path, "--name", "first", "--top-priority", "-5") == 0
        assert run("add", "--file", path, "--name", "other") == 0
        assert [key.top_priority for key in KeyFile(path).read()] == [-5, None]
        assert run("list", "--file", path) == 0
        assert "top_priority=-5" in capsys.readouterr().out

    def test_files_that_cannot_be_used_are_named(self, path: Path, capsys: Captured) -> None:
        assert run("list", "--file", path) == 2
        assert run("add", "--name", "a", "--file", path / "nowhere" / "keys") == 2
        path.write_bytes(b"\xff\n")
        assert run("list", "--file", path) == 2
        assert capsys.readouterr().err.count(str(path)) == 3


def test_keys_that_are_made_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        secrets = list(threads.map(lambda number: add(path, f"key {number}"), range(8)))
    assert {key.sha256 for key in KeyFile(path).read()} == set(map(digest, secrets))
    assert {file.name for file in path.parent.iterdir()} == {"keys", ".keys.lock"}


@settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text().map(lambda line: "{" + "".join(line.splitlines())))
def test_a_record_that_is_none_is_refused_by_its_line(path: Path, line: str) -> None:
    path.write_text(f"plain-key\n{line}\n", encoding="utf-8", errors="replace")
    with pytest.raises(ConfigError, match=f"{path}, line 2"):
        KeyFile(path).read()


class TestRing:
    def test_knows_plain_keys_and_records(self, path: Path) -> None:
        secret = add(path, "a", models=["m"])
        with path.open("a") as file:
            file.write("plain-1 # a note\n")
        ring = KeyRing(["fixed"], path)
        found = ring.find(secret)
        assert found is not None
        assert (found.name, found.models) == ("a", ("m",))
        assert all(ring.find(key) is not None for key in ("plain-1", "fixed"))
        assert not any(
            ring.find(key) for key in ("", "#", "plain-1 # a note", digest("fixed"), "plain-", "a", "\udcff")
        )

    def test_follows_the_file(self, path: Path) -> None:
        path.write_text("one\n")
        ring = KeyRing([], path)
        secret = add(path, "two")
        assert ring.find(secret) is None
        ring.refresh()
        assert ring.find(secret)
        KeyFile(path).revoke("two")
        KeyFile(path).revoke(digest("one")[:16])
        ring.refresh()
        assert not ring.find(secret)
        assert not ring.find("one")

    def test_outlives_a_broken_file_and_says_so_once(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        secret = add(path, "a")
        ring = KeyRing([], path)
        good = path.read_text()
        with caplog.at_level(logging.INFO):
            for broken in (
                '{"sha256": "secret-thing"}',
                '{"sha256": "%s", "wieght": 2}' % ("a" * 64),
                '{"secret-thing',
            ):
                caplog.clear()
                path.write_text(good + broken)
                ring.refresh()
                ring.refresh()
                (record,) = caplog.records
                assert f"{path}, line 2" in record.getMessage()
                assert "secret-thing" not in record.getMessage()
                assert ring.find(secret)
            caplog.clear()
            path.unlink()
            ring.refresh()
            ring.refresh()
            assert len(caplog.records) == 1
            assert ring.find(secret)
            path.write_text("other\n")
            ring.refresh()
            assert not ring.find(secret)
            assert ring.find("other")

    def test_a_line_that_is_being_written_lets_nothing_in(self, path: Path) -> None:
        """Whatever part of the file is there when it is read."""
        secret = add(path, "a")
        old = path.read_text()
        plain, own = "plain-key-of-the-other-team", f"{PREFIX}{'x' * 43}"
        record = new_key(digest("a third key"), "b", {}).model_dump_json(exclude_none=True)
        new = f"{old}# theirs\n{plain}\n{own}\n{record}\n"
        whole = {secret, plain, own, "a third key"}
        ring = KeyRing([], path)
        for written in range(len(old), len(new) + 1):
            path.write_text(new[:written])
            ring.refresh()
            assert ring.find(secret)
            for begin in range(written):
                piece = new[begin:written].rpartition("\n")[2]
                assert piece in whole or not ring.find(piece), "no part of a line is a key"
        assert all(map(ring.find, whole))

    @pytest.mark.parametrize(
        "line",
        [
            *(
                "ab",
                f"{PREFIX}abc",
                f"{PREFIX}{'x' * 42}",
                f"{PREFIX}{'x' * 44}",
                "two words",
                "clé-secrète",
                "a\0bcdefgh",
            ),
            *('ab12cd"}', '"name":"a"}', 'sha256": "ab', "}", '{"sha256": "ab', "{"),
        ],
    )
    def test_what_does_not_look_like_a_key_is_refused_by_its_line(self, path: Path, line: str) -> None:
        path.write_text(f"plain-key\n{line}\n")
        with pytest.raises(ConfigError, match=f"{path}, line 2") as refused:
            KeyFile(path).read()
        assert len(line) < 3 or line not in refused.value.message.partition("line 2")[2]

    @pytest.mark.parametrize("end", [" # a note", f"\n{PREFIX}{'x' * 43}", "\r\n", "\n\n  "])
    def test_a_last_line_that_cannot_be_half_needs_no_newline(self, path: Path, end: str) -> None:
        path.write_text("plain-key" + end)
        assert KeyRing([], path).find("plain-key")

    def test_a_name_does_not_end_the_line_of_its_record(self, path: Path) -> None:
        secret = add(path, "a\u2028b\u0085c")
        found = KeyRing([], path).find(secret)
        assert found is not None
        assert found.name == "a\u2028b\u0085c"

    @pytest.mark.parametrize("kind", ["fifo", "directory", "device", "huge", "dangling link"])
    def test_outlives_a_file_that_is_none(self, path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
        secret = add(path, "a")
        ring = KeyRing([], path)
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "huge":
            path.touch()
            os.truncate(path, 2**40)
        else:
            path.symlink_to("/dev/zero" if kind == "device" else path.with_name("nowhere"))
        ring.refresh()
        ring.refresh()
        (record,) = caplog.records
        assert "the keys stay as they were" in record.getMessage()
        assert str(path) in record.getMessage()
        assert ring.find(secret)
        with pytest.raises(ConfigError, match=str(path)):
            KeyRing(["fixed-key"], path)

    def test_a_file_that_others_can_read_is_warned_of_once(self, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path.write_text("plain-key\n")
        path.chmod(0o644)
        ring = KeyRing([], path)
        for mode in (0o640, 0o644):
            path.write_text(f"plain-key-{mode}\n")
            path.chmod(mode)
            ring.refresh()
        (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert f"chmod 600 {path}" in record.getMessage()

    async def test_a_look_that_hangs_keeps_nobody_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the event loop, nor the end of the program."""
        ring = KeyRing(["fixed-key"], None)
        looking, may_end = threading.Event(), threading.Event()

        def hang() -> None:
            looking.set()
            may_end.wait(300)

        monkeypatch.setattr(keys, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(ring, "refresh", hang)
        watching = asyncio.create_task(ring.watch())
        assert await asyncio.to_thread(looking.wait, 60)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == keys.WATCHER]
        assert thread.daemon
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        may_end.set()
        await asyncio.to_thread(thread.join, 60)
        assert not thread.is_alive()

    @pytest.mark.parametrize("plain", [[], [""], ["a", ""]])
    def test_without_a_key_is_refused(self, plain: list[str]) -> None:
        with pytest.raises(ConfigError, match=r"auth\.api_keys"):
            KeyRing(plain, None)

    def test_with_a_file_that_cannot_be_read_is_refused(self, path: Path) -> None:
        with pytest.raises(ConfigError, match=r"auth\.api_keys_file.*keys"):
            KeyRing(["a"], path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_leaves_the_file_to_whose_it_is(path: Path) -> None:
    path.write_text("")
    os.chown(path, 12345, 12345)
    add(path, "a")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12345)
