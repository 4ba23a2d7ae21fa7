"""What the settings bound is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PER_MINUTE = 40
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def bounded(serve: ServeFactory) -> Iterator[Server]:
    options = [
        *("api.unknown_fields=ignore", "limits.max_body_bytes=2KiB", "limits.max_n=2", "limits.max_prompts=3"),
        *("model.max_model_len=20", "model.name=other", "generation.max_tokens=7", "generation.temperature=0"),
        *("limits.max_stop=2", "limits.max_stop_bytes=4", "limits.max_prompt_tokens=18", "limits.max_schema_bytes=256"),
        *("rate_limiting.enabled=true", f"rate_limiting.requests_per_minute={PER_MINUTE}", "server.cors_origins=*"),
    ]
    with serve(*options, model=TINY) as server:
        yield server


def test_unknown_fields_can_be_let_through(bounded: Server) -> None:
    assert bounded.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1, "prmpt": 1}).status_code == 200
    content = [{"type": "text", "text": "a", "cache_control": {}}]
    body = {"messages": [{"role": "user", "content": content, "nmae": "b"}], "max_tokens": 1, "prmpt": 1}
    assert bounded.http.post(CHAT, json=body).status_code == 200
    chosen = {"type": "function", "function": {"name": "f", "spare": 1}}
    assert "'f' is not in tools" in bounded.refusal(body | {"tool_choice": chosen}, CHAT)["message"]


def test_unsupported_parameters_never_are(bounded: Server) -> None:
    error = bounded.refusal({"prompt": "a", "suffix": "b"})
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")


def test_bodies(bounded: Server) -> None:
    assert bounded.refusal({"prompt": "a", "user": "b" * 2048}, status=413)["code"] == "body_too_large"


def test_responses_to_a_prompt(bounded: Server) -> None:
    assert len(bounded.complete(prompt="a", n=2, max_tokens=1)["choices"]) == 2
    assert bounded.refusal({"prompt": "a", "n": 3, "max_tokens": 1})["param"] == "n"


def test_prompts(bounded: Server) -> None:
    assert len(bounded.complete(prompt=["a"] * 3, max_tokens=1)["choices"]) == 3
    assert bounded.refusal({"prompt": ["a"] * 4, "max_tokens": 1})["param"] == "prompt"


def test_stop_strings(bounded: Server) -> None:
    assert bounded.complete(prompt="a", stop=["\x01" * 4, "éé"], max_tokens=1)
    assert bounded.refusal({"prompt": "a", "stop": ["b", "c", "d"]})["param"] == "stop"
    assert bounded.refusal({"prompt": "a", "stop": ["b", "ééé"]})["param"] == "stop[1]"


def test_schemas(bounded: Server) -> None:
    assert bounded.complete(prompt="a", guided_regex="a" * 18, max_tokens=1)
    for asked in ({"guided_regex": "a" * 300}, {"guided_json": {"type": "object", "title": "é" * 150}}):
        error = bounded.refusal({"prompt": "a", **asked})
        assert error["param"] == next(iter(asked))
        assert "limits.max_schema_bytes" in error["message"]


def test_tokens_of_a_prompt(bounded: Server) -> None:
    for prompt in ("a" * 19, [97] * 19, ["a", "a" * 19]):
        assert "limits.max_prompt_tokens" in bounded.refusal({"prompt": prompt, "max_tokens": 1})["message"]
    assert bounded.complete(prompt=[97] * 18, max_tokens=1)


def test_the_context(bounded: Server) -> None:
    assert bounded.complete(prompt="a" * 15, max_tokens=5)["usage"]["total_tokens"] == 20
    assert bounded.refusal({"prompt": "a" * 15, "max_tokens": 6})["code"] == "context_length_exceeded"
    assert bounded.refusal({"prompt": "a" * 18, "max_tokens": 3})["code"] == "context_length_exceeded"


def test_what_a_request_does_not_say_is_what_the_settings_say(bounded: Server) -> None:
    response = bounded.complete(prompt="a")
    assert response["usage"]["completion_tokens"] == 7
    assert response["choices"][0]["text"] == bounded.text(prompt="a", temperature=0, seed=5)


def test_the_name(bounded: Server) -> None:
    assert bounded.complete(model="other", prompt="a", max_tokens=1)["model"] == "other"
    assert bounded.refusal({"model": "tiny", "prompt": "a"}, status=404)["code"] == "model_not_found"


def test_the_rate_of_each_address_where_there_are_no_keys(bounded: Server) -> None:
    from_elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(base_url=bounded.url, transport=from_elsewhere, timeout=300) as client:
        responses = [client.get("/v1/models", headers={"authorization": f"Bearer {n}"}) for n in range(PER_MINUTE + 1)]
    assert [response.status_code for response in responses] == [200] * PER_MINUTE + [429]
    assert bounded.error(responses[-1], 429)["code"] == "rate_limit_exceeded"
    assert bounded.http.get("/v1/models").status_code == 200


def test_origins_may_be_all(bounded: Server) -> None:
    response = bounded.http.get("/health", headers={"origin": "https://example.org"})
    assert response.headers["access-control-allow-origin"] == "*"
