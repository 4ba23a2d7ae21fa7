"""Who may ask, how often, and from which web pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from starlette.applications import Starlette

from bdh_batch.http.auth.keys import KeyFile, new_key
from bdh_batch.http.middleware import Origins
from tests.conftest import eventually

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PER_MINUTE = 8
ORIGIN = "https://example.org"
BODY = {"prompt": "a", "max_tokens": 1}
KEYS = [f"key-{number:02}-secret" for number in range(40)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    """That of `guarded`."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# keys of the other team\nfrom-file-1\n\n  from-file-2  # a note\n")
    return KeyFile(path)


@pytest.fixture(scope="module")
def guarded(serve: ServeFactory, file: KeyFile) -> Iterator[Server]:
    """Asks for keys, and lets each make PER_MINUTE requests."""
    options = [
        *("auth.protect_metrics=true", "auth.protect_docs=true"),
        *("auth.enabled=true", f"auth.api_keys={','.join(KEYS)}", f"auth.api_keys_file={file.path}"),
        *("rate_limiting.enabled=true", f"rate_limiting.requests_per_minute={PER_MINUTE}"),
        f"server.cors_origins={ORIGIN},http://localhost:3000",
    ]
    with serve(*options, model=TINY) as server:
        yield server


@pytest.fixture
def elsewhere(guarded: Server) -> Iterator[httpx.Client]:
    """Asks from an address that no other test uses: wrong keys count for it."""
    transport = httpx.HTTPTransport(local_address=f"127.0.1.{next(numbers) + 1}")
    with httpx.Client(base_url=guarded.url, transport=transport, timeout=300) as client:
        yield client


def seen(guarded: Server, key: str, known: bool) -> Callable[[], bool]:
    """Whether the server has taken in that `key` is, or is no more, one of its keys."""
    return lambda: (guarded.http.get("/v1/nothing", headers=bearer(key)).status_code == 404) is known


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

    def test_that_are_wrong_learn_nothing(self, guarded: Server, key: str, elsewhere: httpx.Client) -> None:
        wrong = ["wrong", key[:-1], key + "0", key.upper(), "a" * 5000, "from-file-2  # a note", "# keys", "***"]
        responses = [elsewhere.post("/v1/completions", json=BODY, headers=bearer(value)) for value in wrong]
        assert len({response.content for response in responses}) == 1
        for response in responses:
            assert guarded.error(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"

    def test_that_are_missing_are_asked_for(self, guarded: Server, key: str, elsewhere: httpx.Client) -> None:
        right = b"Bearer " + key.encode()
        for values in (
            (),
            (b"",),
            (b"Bearer",),
            (key.encode(),),
            (b"Basic " + key.encode(),),
            (b"Bearer \xff",),
            (right,) * 2,
        ):
            headers = [(b"authorization", value) for value in values]
            response = elsewhere.post("/v1/completions", json=BODY, headers=headers)
            assert guarded.error(response, 401)["code"] == "invalid_api_key"

    def test_are_asked_for_before_the_body_is_looked_at(self, guarded: Server, elsewhere: httpx.Client) -> None:
        response = elsewhere.post("/v1/completions", content=b"{", headers=bearer("wrong"))
        assert guarded.error(response, 401)["code"] == "invalid_api_key"
        assert [elsewhere.get(path).status_code for path in ("/v1/nothing", "/tokenize", "/%761/models")] == [401] * 3

    def test_of_any_case_of_the_scheme(self, guarded: Server, key: str) -> None:
        assert guarded.http.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200

    @pytest.mark.parametrize("path", ["/health", "/healthz", "/livez", "/readyz", "/ready", "/"])
    def test_are_not_asked_for_by_probes(self, guarded: Server, path: str) -> None:
        assert guarded.http.get(path).status_code == 200

    def test_are_asked_for_by_metrics_and_docs_that_are_protected(
        self, guarded: Server, tiny: Server, key: str, elsewhere: httpx.Client
    ) -> None:
        for path in ("/metrics", "/docs", "/openapi.json"):
            assert guarded.error(elsewhere.get(path), 401)["code"] == "invalid_api_key"
            assert elsewhere.get(path, headers=bearer(key)).status_code == tiny.http.get(path).status_code

    def test_are_not_asked_for_unless_enabled(self, tiny: Server) -> None:
        assert tiny.http.get("/v1/models", headers=bearer("anything")).status_code == 200

    def test_come_and_go_without_a_restart(self, guarded: Server, file: KeyFile) -> None:
        key = file.add(partial(new_key, name="passer-by", rights={"requests_per_minute": 10_000}))
        eventually(seen(guarded, key, True))
        before = file.path.read_text()
        file.path.write_text(before + '{"sha256": "not-secret-enough"}\n')
        eventually(lambda: "the keys stay as they were" in guarded.log)
        assert seen(guarded, key, True)()
        file.path.write_text(before)
        file.revoke("passer-by")
        eventually(seen(guarded, key, False))

    def test_may_be_for_some_models_only(self, guarded: Server, file: KeyFile, key: str) -> None:
        other, same = (file.add(partial(new_key, name=name, rights={"models": [name]})) for name in ("gpt", "tiny"))
        eventually(seen(guarded, same, True))
        for model in ("tiny", None):
            refused = guarded.http.post("/v1/completions", json=BODY | {"model": model}, headers=bearer(other))
            assert guarded.error(refused, 403)["param"] == "model"
            served = guarded.http.post("/v1/completions", json=BODY | {"model": model}, headers=bearer(same))
            assert served.status_code == 200
        assert guarded.error(guarded.http.get("/v1/neurons", headers=bearer(other)), 403)["param"] == "model"
        assert guarded.http.get("/v1/models", headers=bearer(other)).json()["data"] == []
        assert len(guarded.http.get("/v1/models", headers=bearer(same)).json()["data"]) == 1
        with guarded.openai(other) as client, pytest.raises(openai.PermissionDeniedError):
            client.models.retrieve("tiny")
        with guarded.openai(other) as client, pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="gpt", prompt="a")
        assert "tiny" not in caught.value.message

    def test_may_have_limits_of_their_own(self, guarded: Server, file: KeyFile) -> None:
        limits = {"requests_per_minute": 4, "tokens_per_minute": 50, "top_priority": 1}
        key = file.add(partial(new_key, name="limited", rights=limits))
        eventually(lambda: guarded.http.get("/v1/models", headers=bearer(key)).status_code == 200)

        def ask(**more: int) -> httpx.Response:
            return guarded.http.post("/v1/completions", json=BODY | {"priority": 1} | more, headers=bearer(key))

        assert guarded.error(ask(priority=0), 403)["param"] == "priority"
        response = ask(max_tokens=20)
        assert response.headers["x-ratelimit-limit-tokens"] == "50"
        assert response.headers["x-ratelimit-remaining-tokens"] == "29"
        refused = ask(max_tokens=40)
        assert "tokens per minute" in guarded.error(refused, 429)["message"]
        assert "requests per minute" in guarded.error(ask(), 429)["message"]

    def test_have_states_that_others_do_not_begin_with(self, guarded: Server, key: str) -> None:
        body = {"prompt": f"a text that nobody else sends, of which {key} makes much use " * 2, "max_tokens": 1}
        cached = [
            guarded.http.post("/v1/completions", json=body, headers=bearer(each)).json()["usage"]
            for each in (key, key, KEYS[-2])
        ]
        assert [usage["prompt_tokens_details"]["cached_tokens"] > 0 for usage in cached] == [False, True, False]

    def test_are_not_in_the_log(self, guarded: Server) -> None:
        assert not any(secret in guarded.log for secret in ("-secret", "from-file", "bdh-"))


class TestRate:
    def test_beyond_the_limit_is_refused(self, guarded: Server, key: str) -> None:
        remaining = []
        for _ in range(PER_MINUTE):
            response = guarded.http.post("/v1/completions", json=BODY, headers=bearer(key))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == str(PER_MINUTE)
            assert 1 <= int(response.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
            remaining.append(int(response.headers["x-ratelimit-remaining-requests"]))
        assert remaining == list(reversed(range(PER_MINUTE)))
        refused = guarded.http.post("/v1/completions", json=BODY, headers=bearer(key))
        assert guarded.error(refused, 429)["code"] == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        with guarded.openai(key) as client, pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="a")
        assert caught.value.code == "rate_limit_exceeded"
        metrics = guarded.http.get("/metrics", headers=bearer(KEYS[-3])).text
        assert 'bdh_admission_rejections_total{model_name="tiny",reason="rate_limit_exceeded"}' in metrics

    def test_of_one_key_is_not_anothers(self, guarded: Server, key: str) -> None:
        while guarded.http.get("/v1/models", headers=bearer(key)).status_code == 200:
            pass
        assert guarded.http.get("/v1/models", headers=bearer(KEYS[-1])).status_code == 200

    def test_counts_refused_requests_that_were_let_in(self, guarded: Server, key: str) -> None:
        responses = [
            guarded.http.post("/v1/completions", content=b"{", headers=bearer(key)) for _ in range(PER_MINUTE + 1)
        ]
        assert [response.status_code for response in responses] == [400] * PER_MINUTE + [429]

    def test_of_wrong_keys_is_that_of_their_address_and_nobody_elses(
        self, guarded: Server, key: str, elsewhere: httpx.Client
    ) -> None:
        responses = [
            elsewhere.get("/v1/models", headers=bearer(f"wrong {n}")).status_code for n in range(PER_MINUTE + 2)
        ]
        assert responses == [401] * PER_MINUTE + [429] * 2
        assert elsewhere.get("/v1/models", headers=bearer(key)).status_code == 200

    def test_of_probes_has_no_limit(self, guarded: Server) -> None:
        responses = {guarded.http.get("/health").status_code for _ in range(3 * PER_MINUTE)}
        assert responses == {200}

    def test_is_not_reported_where_there_is_none(self, tiny: Server) -> None:
        assert not any(name.startswith("x-ratelimit") for name in tiny.http.get("/v1/models").headers)


class TestOrigins:
    def preflight(self, guarded: Server, origin: str) -> dict[str, str]:
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        response = guarded.http.options("/v1/completions", headers=asked)
        if origin == ORIGIN:
            assert response.status_code == 200
        else:
            assert guarded.error(response, 400)["code"] == "origin_not_allowed"
        return dict(response.headers)

    def test_that_are_listed_pass_the_preflight_without_a_key(self, guarded: Server) -> None:
        headers = self.preflight(guarded, ORIGIN)
        assert headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in headers["access-control-allow-methods"]
        assert "authorization" in headers["access-control-allow-headers"].lower()

    def test_that_are_not_listed_do_not(self, guarded: Server) -> None:
        assert "access-control-allow-origin" not in self.preflight(guarded, "https://evil.example")

    def test_that_are_listed_may_read_responses_and_refusals(self, key: str, elsewhere: httpx.Client) -> None:
        for headers, status in ((bearer(key), 200), ({}, 401)):
            response = elsewhere.post("/v1/completions", json=BODY, headers=headers | {"origin": ORIGIN})
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "x-request-id" in response.headers["access-control-expose-headers"]

    def test_that_are_not_listed_may_not(self, guarded: Server, key: str) -> None:
        response = guarded.http.get("/v1/models", headers=bearer(key) | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers

    def test_are_none_by_default(self, tiny: Server) -> None:
        assert "access-control-allow-origin" not in tiny.http.get("/v1/models", headers={"origin": ORIGIN}).headers

    def test_that_are_listed_may_send_credentials_and_all_may_not(self, guarded: Server, key: str) -> None:
        assert self.preflight(guarded, ORIGIN)["access-control-allow-credentials"] == "true"
        response = guarded.http.get("/v1/models", headers=bearer(key) | {"origin": ORIGIN, "cookie": "a=b"})
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["access-control-allow-credentials"] == "true"
        with_any = Origins(Starlette(), ["*"])
        assert "access-control-allow-credentials" not in with_any.preflight_headers | with_any.simple_headers

    def test_that_are_refused_name_the_option(self, guarded: Server, tiny: Server) -> None:
        for server in (guarded, tiny):
            asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
            for path in ("/v1/completions", "/v1/models", "/nothing"):
                error = server.error(server.http.options(path, headers=asked), 400)
                assert "server.cors_origins" in error["message"]
                assert "https://page.example" in error["message"]
            assert "server.cors_origins" in server.log
