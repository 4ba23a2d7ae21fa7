"""Who may ask, how often, and from which web pages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PER_MINUTE = 8
ORIGIN = "https://example.org"
BODY = {"prompt": "a", "max_tokens": 1}
KEYS = [f"key-{number:02}-secret" for number in range(40)]


@pytest.fixture(scope="module")
def guarded(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Asks for keys, and lets each make PER_MINUTE requests."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# keys of the other team\nfrom-file-1\n\n  from-file-2  # a note\n")
    options = [
        *("auth.enabled=true", f"auth.api_keys={','.join(KEYS)}", f"auth.api_keys_file={file}"),
        *("rate_limiting.enabled=true", f"rate_limiting.requests_per_minute={PER_MINUTE}"),
        f"server.cors_origins={ORIGIN},http://localhost:3000",
    ]
    with serve(*options, model=TINY) as server:
        yield server


numbers = count()


@pytest.fixture
def key() -> str:
    """A key that no other test spends."""
    return KEYS[next(numbers)]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class TestKeys:
    def test_let_requests_in(self, guarded: Server, key: str) -> None:
        with guarded.openai(key) as client:
            assert client.models.list().data
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
            messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "a"}]
            stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1, stream=True)
            assert list(stream)

    @pytest.mark.parametrize("key", ["from-file-1", "from-file-2"])
    def test_may_come_from_a_file(self, guarded: Server, key: str) -> None:
        with guarded.openai(key) as client:
            assert client.models.list().data

    def test_that_are_wrong_are_the_clients_authentication_error(self, guarded: Server) -> None:
        with guarded.openai("wrong") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.completions.create(model="tiny", prompt="a")
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                client.models.list()

    def test_that_are_wrong_learn_nothing(self, guarded: Server, key: str) -> None:
        wrong = ["wrong", key[:-1], key + "0", key.upper(), "a" * 5000, "from-file-2  # a note", "# keys", "***"]
        answers = [guarded.http.post("/v1/completions", json=BODY, headers=bearer(value)) for value in wrong]
        assert len({answer.content for answer in answers}) == 1
        for answer in answers:
            assert guarded.error(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("header", [None, b"", b"Bearer", b"key-00-secret", b"Basic key-00-secret", b"Bearer \xff"])
    def test_that_are_missing_are_asked_for(self, guarded: Server, header: bytes | None) -> None:
        headers = [] if header is None else [(b"authorization", header)]
        answer = guarded.http.post("/v1/completions", json=BODY, headers=headers)
        assert guarded.error(answer, 401)["code"] == "invalid_api_key"

    def test_are_asked_for_before_the_body_is_looked_at(self, guarded: Server) -> None:
        answer = guarded.http.post("/v1/completions", content=b"{", headers=bearer("wrong"))
        assert guarded.error(answer, 401)["code"] == "invalid_api_key"
        assert guarded.http.get("/v1/nothing").status_code == 401

    def test_of_any_case_of_the_scheme(self, guarded: Server, key: str) -> None:
        assert guarded.http.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200

    @pytest.mark.parametrize("path", ["/health", "/healthz", "/livez", "/readyz", "/ready", "/metrics", "/"])
    def test_are_not_asked_for_by_probes(self, guarded: Server, path: str) -> None:
        assert guarded.http.get(path).status_code == 200

    def test_are_not_asked_for_unless_enabled(self, tiny: Server) -> None:
        assert tiny.http.get("/v1/models", headers=bearer("anything")).status_code == 200

    def test_are_not_in_the_log(self, guarded: Server) -> None:
        assert not any(secret in guarded.log for secret in ("-secret", "from-file"))


class TestRate:
    def test_beyond_the_limit_is_refused(self, guarded: Server, key: str) -> None:
        remaining = []
        for _ in range(PER_MINUTE):
            answer = guarded.http.post("/v1/completions", json=BODY, headers=bearer(key))
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == str(PER_MINUTE)
            assert 1 <= int(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
            remaining.append(int(answer.headers["x-ratelimit-remaining-requests"]))
        assert remaining == list(reversed(range(PER_MINUTE)))
        refused = guarded.http.post("/v1/completions", json=BODY, headers=bearer(key))
        assert guarded.error(refused, 429)["code"] == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        with guarded.openai(key) as client, pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="a")
        assert caught.value.code == "rate_limit_exceeded"
        assert guarded.metrics()["bdh_admission_rejections_total{reason=rate_limit_exceeded}"] >= 2

    def test_of_one_key_is_not_anothers(self, guarded: Server, key: str) -> None:
        while guarded.http.get("/v1/models", headers=bearer(key)).status_code == 200:
            pass
        assert guarded.http.get("/v1/models", headers=bearer(KEYS[-1])).status_code == 200

    def test_counts_refused_requests_that_were_let_in(self, guarded: Server, key: str) -> None:
        answers = [
            guarded.http.post("/v1/completions", content=b"{", headers=bearer(key)) for _ in range(PER_MINUTE + 1)
        ]
        assert [answer.status_code for answer in answers] == [400] * PER_MINUTE + [429]

    def test_is_not_spent_by_wrong_keys(self, guarded: Server) -> None:
        answers = {guarded.http.get("/v1/models", headers=bearer("wrong")).status_code for _ in range(2 * PER_MINUTE)}
        assert answers == {401}

    def test_of_probes_has_no_limit(self, guarded: Server) -> None:
        answers = {guarded.http.get("/health").status_code for _ in range(3 * PER_MINUTE)}
        assert answers == {200}

    def test_is_not_told_where_there_is_none(self, tiny: Server) -> None:
        assert not any(name.startswith("x-ratelimit") for name in tiny.http.get("/v1/models").headers)


class TestOrigins:
    def preflight(self, guarded: Server, origin: str) -> dict[str, str]:
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        response = guarded.http.options("/v1/completions", headers=asked)
        assert response.status_code == (200 if origin == ORIGIN else 400)
        return dict(response.headers)

    def test_that_are_listed_pass_the_preflight_without_a_key(self, guarded: Server) -> None:
        headers = self.preflight(guarded, ORIGIN)
        assert headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in headers["access-control-allow-methods"]
        assert "authorization" in headers["access-control-allow-headers"].lower()

    def test_that_are_not_listed_do_not(self, guarded: Server) -> None:
        assert "access-control-allow-origin" not in self.preflight(guarded, "https://evil.example")

    def test_that_are_listed_may_read_answers_and_refusals(self, guarded: Server, key: str) -> None:
        for headers, status in ((bearer(key), 200), ({}, 401)):
            response = guarded.http.post("/v1/completions", json=BODY, headers=headers | {"origin": ORIGIN})
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "x-request-id" in response.headers["access-control-expose-headers"]

    def test_that_are_not_listed_may_not(self, guarded: Server, key: str) -> None:
        response = guarded.http.get("/v1/models", headers=bearer(key) | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers

    def test_are_none_by_default(self, tiny: Server) -> None:
        assert "access-control-allow-origin" not in tiny.http.get("/v1/models", headers={"origin": ORIGIN}).headers
