"""Every wrong request gets an error that names the thing, and leaves the server as it was."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

if TYPE_CHECKING:
    from tests.conftest import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}
MODEL_LIMIT = 131072
TEXT = {"type": "text", "text": "a"}


@pytest.fixture(autouse=True)
def unharmed(tiny: Server) -> Iterator[None]:
    """After every test of this module the server answers as ever."""
    yield
    assert tiny.http.get("/health").status_code == 200
    assert tiny.complete(prompt="a", max_tokens=2, temperature=0)["usage"]["completion_tokens"] == 2


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"} | fields]}


def each(field: str, param: str, values: Iterable[object]) -> list[tuple[str, object, str]]:
    return [(field, value, param) for value in values]


class TestBodies:
    @PATHS
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"prompt=a&max_tokens=1",
            b'{"prompt": "a",}',
            b"{'prompt': 'a'}",
            b'{"prompt": "a"} {"prompt": "b"}',
            b'{"prompt": "\xff\xfe", "max_tokens": 1}',
            b'\xef\xbb\xbf{"prompt": "a"}',
            b'{"prompt": "a\xed\xa0\x80", "max_tokens": 1}',
            rb'{"prompt": "a\ud800", "max_tokens": 1}',
            rb'{"prompt": "\udc00\ud800", "max_tokens": 1}',
            rb'{"messages": [{"role": "user", "content": "\ud83d"}], "max_tokens": 1}',
            b'{"prompt": "a", "temperature": NaN}',
            b'{"prompt": "a", "temperature": Infinity}',
            b'{"prompt": "a", "temperature": -Infinity}',
            b"\x00" * 100,
            b"[" * 100_000,
            b"[" * 100_000 + b"]" * 100_000,
            b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000,
        ],
        ids=lambda content: repr(content[:24]),
    )
    def test_that_are_not_json_are_refused(self, tiny: Server, path: str, content: bytes) -> None:
        assert tiny.refusal(path=path, content=content)["code"] == "invalid_json"

    @PATHS
    @pytest.mark.parametrize("body", [[], "prompt", 1, None, True, [{"prompt": "a"}]], ids=repr)
    def test_that_are_not_objects_are_refused(self, tiny: Server, path: str, body: object) -> None:
        assert "object" in tiny.refusal(body, path)["message"]

    @PATHS
    @pytest.mark.parametrize("depth", [10, 200, 900])
    def test_that_are_nested_deep_are_read_or_refused(self, tiny: Server, path: str, depth: int) -> None:
        nested: object = 1
        for _ in range(depth):
            nested = [nested]
        field = "prompt" if path == COMPLETIONS else "messages"
        assert tiny.refusal(BODIES[path] | {field: nested}, path)["param"] in (field, f"{field}[0]")
        response = tiny.http.post(path, json=BODIES[path] | {"metadata": {"deep": nested}})
        assert response.status_code in (200, 400)

    @PATHS
    @pytest.mark.parametrize(
        "kind", ["application/json", 'Application/JSON; charset="UTF-8"', "application/vnd.api+json", "text/json", ""]
    )
    def test_may_be_json_by_any_name_or_by_none(self, tiny: Server, path: str, kind: str) -> None:
        content = json.dumps(BODIES[path]).encode()
        assert tiny.http.post(path, content=content, headers={"content-type": kind}).status_code == 200

    @PATHS
    @pytest.mark.parametrize(
        "kind",
        [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=a",
            "application/json; charset=latin1",
        ],
    )
    def test_that_say_they_are_something_else_are_refused(self, tiny: Server, path: str, kind: str) -> None:
        content = json.dumps(BODIES[path]).encode()
        response = tiny.http.post(path, content=content, headers={"content-type": kind})
        assert tiny.error(response, 415)["code"] == "unsupported_media_type"


class TestTypes:
    @PATHS
    @pytest.mark.parametrize(
        ("field", "value", "param"),
        [
            *each("model", "model", (5, [], {}, True)),
            *each("max_tokens", "max_tokens", ("5", 1.5, True, [], {})),
            *each("temperature", "temperature", ("1", True, [], {})),
            *each("top_p", "top_p", ("0.5", True, [0.5])),
            *each("top_k", "top_k", ("5", 1.5, True, [])),
            *each("min_p", "min_p", ("0.5", True, [])),
            *each("presence_penalty", "presence_penalty", ("1", True, [])),
            *each("frequency_penalty", "frequency_penalty", ("1", True, [])),
            *each("repetition_penalty", "repetition_penalty", ("1", True, [])),
            *each("logit_bias", "logit_bias", ([], "a", 5, True)),
            *(("logit_bias", {key: 1}, f"logit_bias.{key}") for key in ("a", "-1", "1.0", "05", "", "²", "9" * 30)),
            *each("logit_bias", "logit_bias.5", ({"5": None}, {"5": "1"}, {"5": True}, {"5": []})),
            *each("stop_token_ids", "stop_token_ids", (5, "5", {}, True)),
            *(("stop_token_ids", [1, value], "stop_token_ids[1]") for value in ("5", 1.5, True, None, -1, 256)),
            *each("min_tokens", "min_tokens", ("1", 1.5, True)),
            *each("ignore_eos", "ignore_eos", (1, "true")),
            *each("include_stop_str_in_output", "include_stop_str_in_output", (1, "true")),
            *each("top_logprobs", "top_logprobs", ("1", 1.5, True)),
            *each("seed", "seed", ("5", 1.5, True, [])),
            *each("n", "n", ("1", 1.5, True, [])),
            *each("stop", "stop", (5, True, {})),
            *each("stop", "stop[0]", ([5], [None], [["a"]], [""], "")),
            ("stop", ["a", ""], "stop[1]"),
            *each("stream", "stream", ("true", 1, 0, [])),
            *each("stream_options", "stream_options", ([], "a", True)),
            ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
            ("stream_options", {"include_usage": "true"}, "stream_options.include_usage"),
            *each("return_token_ids", "return_token_ids", ("true", 1, [])),
            *each("user", "user", (5, [], {})),
            *each("metadata", "metadata", (5, [], "a")),
            *each("store", "store", (1, "true")),
        ],
    )
    def test_of_every_field_are_strict(self, tiny: Server, path: str, field: str, value: object, param: str) -> None:
        error = tiny.refusal(BODIES[path] | {field: value}, path)
        assert error["param"] == param
        assert param in error["message"]

    @pytest.mark.parametrize(
        "prompt",
        [5, 1.5, True, None, {}, [True], [1.5], ["a", 1], [["a"]], [[1], "a"], [None], [[1.0]], [[True]], [[[1]]]],
    )
    def test_of_a_prompt_are_strict(self, tiny: Server, prompt: object) -> None:
        assert tiny.refusal({"prompt": prompt, "max_tokens": 1})["param"] == "prompt"

    @pytest.mark.parametrize("value", ["5", 1.5, True])
    def test_of_max_completion_tokens_are_strict(self, tiny: Server, value: object) -> None:
        assert tiny.refusal(message() | {"max_completion_tokens": value}, CHAT)["param"] == "max_completion_tokens"

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "messages"),
            ({"messages": None}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": {"role": "user", "content": "a"}}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": [5]}, "messages[0]"),
            ({"messages": [{"content": "a"}]}, "messages[0].role"),
            (message(role=5), "messages[0].role"),
            (message(role=None), "messages[0].role"),
            (message(role=["user"]), "messages[0].role"),
            ({"messages": [{"role": "user"}]}, "messages[0].content"),
            (message(content=5), "messages[0].content"),
            (message(content=None), "messages[0].content"),
            (message(content={"type": "text", "text": "a"}), "messages[0].content"),
            (message(content=[5]), "messages[0].content[0]"),
            (message(content=[{"text": "a"}]), "messages[0].content[0].type"),
            (message(content=[{"type": "text"}]), "messages[0].content[0].text"),
            (message(content=[TEXT, TEXT | {"text": 5}]), "messages[0].content[1].text"),
            (message(role="tool"), "messages[0].tool_call_id"),
            (message(role="tool", tool_call_id=None), "messages[0].tool_call_id"),
            (message(role="tool", tool_call_id=5), "messages[0].tool_call_id"),
            (message(name=5), "messages[0].name"),
            ({"messages": [*message()["messages"], {"role": "user", "content": 5}]}, "messages[1].content"),
        ],
        ids=repr,
    )
    def test_of_messages_are_strict(self, tiny: Server, body: dict[str, Any], param: str) -> None:
        error = tiny.refusal(body, CHAT)
        assert error["param"] == param
        assert param in error["message"]
        assert "instance of" not in error["message"], "clients do not know the classes of the server"

    @pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "tool_result", "nonsense"])
    def test_of_content_other_than_text_are_not_supported(self, tiny: Server, kind: str) -> None:
        content = [TEXT, {"type": kind, kind: {"url": "http://example.com"}}]
        error = tiny.refusal(message(content=content), CHAT)
        assert (error["param"], error["code"]) == ("messages[0].content[1]", "unsupported_parameter")
        assert kind in error["message"]


class TestRanges:
    @PATHS
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("max_tokens", value) for value in (0, -1, -(2**63))),
            *(("temperature", value) for value in (-0.001, 2.001, -5, 1e308)),
            *(("top_p", value) for value in (-0.1, 1.001, 50)),
            *(("top_k", value) for value in (-2, -(2**63))),
            *(("n", value) for value in (0, -1, 17, 2**63)),
            *(("seed", value) for value in (-(2**63) - 1, 2**64, 10**30)),
            ("stop", [chr(97 + i) for i in range(17)]),
            *(("min_p", value) for value in (-0.1, 1.01)),
            *((f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (-2.01, 2.01)),
            *(("repetition_penalty", value) for value in (0, -1)),
            *(("min_tokens", value) for value in (-1, 2)),
            *(("top_logprobs", value) for value in (-1, 1, 21)),
        ],
    )
    def test_end_where_the_api_says(self, tiny: Server, path: str, field: str, value: object) -> None:
        error = tiny.refusal(BODIES[path] | {field: value}, path)
        assert error["param"] == field
        assert field in error["message"]

    @PATHS
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("temperature", value) for value in (0, 0.0, 2, 2.0, 1)),
            *(("top_p", value) for value in (0, 0.0, 1, 1.0, 1e-9, 5e-324)),
            *(("top_k", value) for value in (-1, 0, 1, 256, 10_000)),
            *(("n", value) for value in (1, 16)),
            *(("seed", value) for value in (-(2**63), -1, 0, 2**63, 2**64 - 1)),
            ("stop", [chr(97 + i) for i in range(16)]),
            ("stop", []),
            *(("min_p", value) for value in (0, 0.0, 1, 5e-324)),
            *((f"{kind}_penalty", value) for kind in ("presence", "frequency") for value in (-2, 0, 2.0)),
            *(("repetition_penalty", value) for value in (5e-324, 1, 1.7e308)),
            *(("logit_bias", value) for value in ({}, {"0": -100, "255": 100, "7": 0}, {"7": -100.0})),
            *(("stop_token_ids", value) for value in ([], [0, 255, 255], list(range(256)))),
            *(("min_tokens", value) for value in (0, 1)),
            *((name, value) for name in ("ignore_eos", "include_stop_str_in_output") for value in (True, False)),
        ],
    )
    def test_hold_their_ends(self, tiny: Server, path: str, field: str, value: object) -> None:
        assert tiny.http.post(path, json=BODIES[path] | {field: value}).status_code == 200

    @PATHS
    def test_of_tokens_end_with_the_vocabulary(self, tiny: Server, path: str) -> None:
        for token in ("256", str(2**63), str(10**18)):
            assert tiny.refusal(BODIES[path] | {"logit_bias": {token: 0}}, path)["param"] == f"logit_bias.{token}"
        every = {"stop_token_ids": list(range(256)), "min_tokens": 1}
        assert tiny.refusal(BODIES[path] | every, path)["param"] == "stop_token_ids"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            *(({"logprobs": value}, "logprobs") for value in (-1, 21, True, "5", 1.0)),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 0, "echo": False}, "max_tokens"),
            ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
            ({"echo": 1}, "echo"),
            ({"best_of": 17}, "best_of"),
            ({"best_of": 0}, "best_of"),
            ({"best_of": 1, "n": 2}, "best_of"),
            ({"best_of": 2, "stream": True}, "best_of"),
        ],
        ids=str,
    )
    def test_of_completions_own(self, tiny: Server, fields: dict[str, Any], param: str) -> None:
        error = tiny.refusal(BODIES[COMPLETIONS] | fields)
        assert error["param"] == param
        assert param in error["message"]

    @PATHS
    @pytest.mark.parametrize("value", [0, 1025, "5", True])
    def test_of_tokens_a_chunk_are_bounded(self, tiny: Server, path: str, value: object) -> None:
        error = tiny.refusal(BODIES[path] | {"stream": True, "stream_options": {"chunk_tokens": value}}, path)
        assert error["param"] == "stream_options.chunk_tokens"

    @PATHS
    def test_of_the_response_end_with_the_context(self, tiny: Server, path: str) -> None:
        for most in (MODEL_LIMIT, 2**63 - 1, 2**64 - 1):
            assert tiny.refusal(BODIES[path] | {"max_tokens": most}, path)["code"] == "context_length_exceeded"

    def test_of_max_tokens_under_two_names_must_agree(self, tiny: Server) -> None:
        assert tiny.refusal(message() | {"max_tokens": 3, "max_completion_tokens": 4}, CHAT)["param"] == "max_tokens"
        both = message() | {"max_tokens": 3, "max_completion_tokens": 3}
        assert tiny.http.post(CHAT, json=both).json()["usage"]["completion_tokens"] == 3
        error = tiny.refusal(message() | {"max_completion_tokens": 2**40}, CHAT)
        assert (error["param"], error["code"]) == ("max_completion_tokens", "context_length_exceeded")

    @pytest.mark.parametrize("value", [0, -1])
    def test_of_max_completion_tokens_begin_at_one(self, tiny: Server, value: int) -> None:
        assert tiny.refusal(message() | {"max_completion_tokens": value}, CHAT)["param"] == "max_completion_tokens"

    def test_of_prompts_end_where_the_settings_say(self, tiny: Server) -> None:
        assert len(tiny.complete(prompt=["a"] * 128, max_tokens=1)["choices"]) == 128
        assert tiny.refusal({"prompt": ["a"] * 129, "max_tokens": 1})["param"] == "prompt"

    @pytest.mark.parametrize("token", [-1, 256, 2**31, 2**63, 2**64 - 1])
    def test_of_token_ids_end_with_the_vocabulary(self, tiny: Server, token: int) -> None:
        for prompt in ([97, token], [[97], [token]]):
            error = tiny.refusal({"prompt": prompt, "max_tokens": 1})
            assert error["param"] == "prompt"
            assert "255" in error["message"]

    @PATHS
    @pytest.mark.parametrize(
        "number", [str(2**63), str(2**64), "1" + "0" * 400, "-1" + "0" * 400, "1e400", "-0", "1e-400"]
    )
    @pytest.mark.parametrize("field", ["max_tokens", "temperature", "top_p", "top_k", "seed", "n", "priority"])
    def test_survive_absurd_numbers(self, tiny: Server, path: str, field: str, number: str) -> None:
        rest = json.dumps({key: value for key, value in BODIES[path].items() if key != field})
        response = tiny.http.post(path, content=f'{rest[:-1]}, "{field}": {number}}}'.encode())
        if response.status_code != 200:
            tiny.error(response, 400)

    @pytest.mark.parametrize("extreme", [{"top_k": 2**63}, {"top_k": 2**64 - 1}, {"temperature": 1e-40}])
    def test_whatever_they_let_through_ends_no_neighbour(self, tiny: Server, extreme: dict[str, Any]) -> None:
        neighbour = tiny.raw({"prompt": "a", "max_tokens": 100_000, "stream": True})
        neighbour.read_until(b"data: ")
        response = tiny.http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 4} | extreme)
        running = tiny.metrics()["bdh_num_requests_running"]
        neighbour.close()
        tiny.until_idle()
        assert running == 1
        assert response.status_code in (200, 400)


class TestPrompts:
    @pytest.mark.parametrize("prompt", ["", [], [""], ["a", ""], [[]], [[97], []]], ids=repr)
    def test_that_are_empty_are_refused(self, tiny: Server, prompt: object) -> None:
        error = tiny.refusal({"prompt": prompt, "max_tokens": 1})
        assert error["param"] == "prompt"
        assert "empty" in error["message"]

    def test_must_be_there(self, tiny: Server) -> None:
        assert tiny.refusal({"max_tokens": 1})["param"] == "prompt"

    def test_of_a_megabyte_exceed_the_context(self, tiny: Server) -> None:
        error = tiny.refusal({"prompt": "a" * 2**20, "max_tokens": 1})
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        error = tiny.refusal({"prompt": ["a", "é" * 2**19], "max_tokens": 1})
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        error = tiny.refusal({"prompt": [97] * (MODEL_LIMIT + 1), "max_tokens": 1})
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        error = tiny.refusal(message(content="a" * 2**20), CHAT)
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")

    def test_with_control_characters_are_served(self, tiny: Server) -> None:
        prompt = "\0\x01\r\n\x7f\u2028\U0010ffff\ufeff"
        assert tiny.complete(prompt=prompt, max_tokens=1)["usage"]["prompt_tokens"] == len(prompt.encode())


FOO = {"foo": 1}
FUNCTION = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"name": "a", "schema": {"enum": [1]}}
NESTED: list[tuple[str, dict[str, Any]]] = [
    ("messages[0].content[1]", message(content=[TEXT, TEXT | FOO])),
    ("tools[0]", {"tools": [FUNCTION | FOO]}),
    ("tools[0].function", {"tools": [FUNCTION | {"function": {"name": "f"} | FOO}]}),
    ("tool_choice", {"tools": [FUNCTION], "tool_choice": FUNCTION | FOO}),
    ("tool_choice.function", {"tools": [FUNCTION], "tool_choice": FUNCTION | {"function": {"name": "f"} | FOO}}),
    ("stream_options", {"stream": True, "stream_options": FOO}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": SCHEMA} | FOO}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema", "json_schema": SCHEMA | FOO}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a"} | FOO}),
]


class TestUnknown:
    @PATHS
    @pytest.mark.parametrize("field", ["prmpt", "max_token", "Temperature", "", "é", "a.b", "__class__", "context"])
    def test_fields_are_refused_by_name(self, tiny: Server, path: str, field: str) -> None:
        error = tiny.refusal(BODIES[path] | {field: 1}, path)
        assert error["code"] == "unknown_parameter"
        assert error["param"] == field
        assert field in error["message"]

    @PATHS
    def test_fields_say_which_option_lets_them_pass(self, tiny: Server, path: str) -> None:
        assert "api.unknown_fields" in tiny.refusal(BODIES[path] | {"prmpt": 1}, path)["message"]

    @pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/embeddings", "/tokenize", "/detokenize"])
    def test_fields_that_are_null_are_as_good_as_left_out(self, tiny: Server, path: str) -> None:
        bodies: dict[str, Any] = BODIES | {"/v1/embeddings": {"input": "a"}, "/tokenize": {"prompt": "a"}}
        body = bodies.get(path, {"tokens": [97]}) | {"prmpt": None, "mirostat": None, "min_p_scale": None}
        assert tiny.http.post(path, json=body).status_code == 200

    @pytest.mark.parametrize(("location", "body"), NESTED)
    def test_nested_fields_that_are_null_are_too(self, tiny: Server, location: str, body: dict[str, Any]) -> None:
        content = json.dumps(BODIES[CHAT] | body).replace('"foo": 1', '"foo": null')
        assert tiny.http.post(CHAT, content=content.encode()).status_code == 200, location

    @PATHS
    @pytest.mark.parametrize(
        ("field", "value", "meant"),
        [
            *(("n_predict", 5, "max_tokens"), ("max_new_tokens", 5, "max_tokens"), ("num_predict", 5, "max_tokens")),
            *(
                ("repeat_penalty", 1.1, "repetition_penalty"),
                ("stop_sequences", ["a"], "stop"),
                ("random_seed", 1, "seed"),
            ),
            *(("typical_p", 0.9, "min_p"), ("mirostat", 2, "min_p"), ("cache_prompt", False, "prefix_cache.enabled")),
            *(("regex", "a", "structured_outputs.regex"), ("extra_body", {"top_k": 1}, "beside")),
            ("num_ctx", 512, "model.max_model_len"),
        ],
    )
    def test_fields_of_other_servers_suggest_those_of_this_one(
        self, tiny: Server, path: str, field: str, value: object, meant: str
    ) -> None:
        error = tiny.refusal(BODIES[path] | {field: value}, path)
        assert (error["param"], error["type"]) == (field, "invalid_request_error")
        assert meant in error["message"]

    @pytest.mark.parametrize(("location", "body"), NESTED)
    def test_nested_fields_are_refused_by_name(self, tiny: Server, location: str, body: dict[str, Any]) -> None:
        for path in (COMPLETIONS, CHAT) if body.keys().isdisjoint({"messages", "tools"}) else (CHAT,):
            error = tiny.refusal(BODIES[path] | body, path)
            assert (error["param"], error["code"]) == (f"{location}.foo", "unknown_parameter")

    def test_fields_of_the_other_endpoint_are_refused(self, tiny: Server) -> None:
        assert tiny.refusal(BODIES[COMPLETIONS] | {"messages": []})["param"] == "messages"
        assert tiny.refusal(BODIES[COMPLETIONS] | {"max_completion_tokens": 1})["param"] == "max_completion_tokens"
        assert tiny.refusal(BODIES[CHAT] | {"prompt": "a"}, CHAT)["param"] == "prompt"

    @PATHS
    @pytest.mark.parametrize("model", ["gpt-4", "", "tiny/", "TINY", "../tiny"])
    def test_models_are_not_found(self, tiny: Server, path: str, model: str) -> None:
        error = tiny.refusal(BODIES[path] | {"model": model}, path, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert repr(model) in error["message"]
        assert "Available: 'tiny', 'minute', 'tiny-xxx" in error["message"]
        assert len(error["message"]) < 500

    def test_models_are_the_clients_not_found_error(self, tiny: Server) -> None:
        with tiny.openai() as client:
            with pytest.raises(openai.NotFoundError) as caught:
                client.completions.create(model="gpt-4", prompt="a")
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}], stream=True)

    def test_fields_are_the_clients_bad_request_error(self, tiny: Server) -> None:
        with tiny.openai() as client, pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="a", extra_body={"prmpt": "b"})
        assert (caught.value.code, caught.value.param) == ("unknown_parameter", "prmpt")

    @pytest.mark.parametrize("path", ["/v1", "/v1/", "/nothing", "/v3/completions", "/%00", "/é", "//"])
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    def test_paths_are_not_found(self, tiny: Server, path: str, method: str) -> None:
        error = tiny.error(tiny.http.request(method, tiny.url + path), 404)
        assert error["code"] == "not_found"
        assert "mean" not in error["message"]
        assert f"The path {httpx.URL(tiny.url + path).path} does not exist" in error["message"]
        assert "/v1/completions" in error["message"]

    @pytest.mark.parametrize(
        ("path", "near"),
        [
            *((path, CHAT) for path in ("/v1/chats", "/api/chat", "/v1/chat/completion")),
            ("/v3/completions", COMPLETIONS),
            ("/v1/embedding", "/v1/embeddings"),
            ("/v1/response", "/v1/responses"),
            ("/" + "v1/" * 5000, CHAT),
        ],
    )
    def test_paths_suggest_what_is_near_them(self, tiny: Server, path: str, near: str) -> None:
        message = tiny.error(tiny.http.post(path, json={}), 404)["message"]
        assert near in message
        assert "/openapi.json" in message

    @pytest.mark.parametrize(
        ("method", "path", "meant"),
        [
            *(("POST", path.removeprefix("/v1"), path) for path in (COMPLETIONS, CHAT, "/v1/embeddings")),
            ("GET", "/models", "/v1/models"),
            ("GET", "/models/tiny", "/v1/models/tiny"),
            ("POST", f"/v1{CHAT}", CHAT),
            ("GET", "/v1/health", "/health"),
            ("POST", "/v1/v1/embeddings", "/v1/embeddings"),
            ("POST", "/v1/chat/completions/", CHAT),
            ("POST", "/v1//completions", COMPLETIONS),
            ("POST", "/completions/", COMPLETIONS),
        ],
    )
    def test_paths_of_a_wrong_base_url_suggest_the_right_one(
        self, tiny: Server, method: str, path: str, meant: str
    ) -> None:
        error = tiny.error(tiny.http.request(method, path), 404)
        assert (error["code"], error["message"]) == (
            "not_found",
            f"The path {path} does not exist. Did you mean {meant}?",
        )

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            *((method, COMPLETIONS, "POST") for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS")),
            ("GET", CHAT, "POST"),
            ("POST", "/v1/models", "GET"),
            ("DELETE", "/v1/models/tiny", "GET"),
            ("POST", "/health", "GET"),
            ("POST", "/metrics", "GET"),
            ("POST", "/", "GET"),
            ("PUT", "/v1/states", "GET, HEAD, POST"),
            ("PUT", "/v1/states/st_1", "DELETE, GET, HEAD"),
        ],
    )
    def test_methods_are_refused_with_those_there_are(self, tiny: Server, method: str, path: str, allowed: str) -> None:
        response = tiny.http.request(method, path)
        error = tiny.error(response, 405)
        assert error["code"] == "method_not_allowed"
        assert allowed in error["message"]
        assert {*allowed.split(", ")} <= {*response.headers["allow"].split(", ")}


UNSUPPORTED: dict[str, tuple[list[object], list[object]]] = {  # what asks for something, what asks for nothing
    "suffix": (["b"], [""]),
    "audio": ([{"voice": "ash", "format": "wav"}], []),
    "modalities": ([["text", "audio"]], [["text"]]),
    "reasoning_effort": (["low"], ["none"]),
    "verbosity": (["low"], ["medium"]),
    "service_tier": (["priority"], ["auto", "default", "flex"]),
    "length_penalty": ([2, 0.5, True], [1, 1.0]),
    "early_stopping": ([True, "never", 0], [False]),
    "use_beam_search": ([True], [False]),
    "spaces_between_special_tokens": (["a"], [True, False]),
    "guided_decoding_backend": (["a"], ["auto", "outlines", "xgrammar"]),
    "include_reasoning": ([1], [True, False]),
    "prompt_cache_retention": (["24h"], ["in_memory"]),
    "mirostat": ([1, False], [0]),
    "typical_p": ([0.5], [1, 1.0]),
    "cache_prompt": ([False], [True]),
    "repeat_penalty": ([1.1], [1]),
    "logits_processors": (["a"], [[]]),
}


class TestUnsupported:
    @PATHS
    @pytest.mark.parametrize(
        ("field", "value"), [(name, value) for name, (asks, _) in UNSUPPORTED.items() for value in asks]
    )
    def test_parameters_are_refused_by_name(self, tiny: Server, path: str, field: str, value: object) -> None:
        error = tiny.refusal(BODIES[path] | {field: value}, path)
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")
        assert field in error["message"]

    @PATHS
    @pytest.mark.parametrize("field", UNSUPPORTED)
    def test_parameters_that_ask_for_nothing_are_accepted(self, tiny: Server, path: str, field: str) -> None:
        for value in (None, *UNSUPPORTED[field][1]):
            assert tiny.http.post(path, json=BODIES[path] | {field: value}).status_code == 200, value

    @pytest.mark.parametrize(
        ("path", "field", "asks", "asks_not"),
        [(CHAT, "best_of", 2, 1), (COMPLETIONS, "top_logprobs", 3, 0)],
    )
    def test_parameters_of_the_other_endpoint_are_refused_by_name(
        self, tiny: Server, path: str, field: str, asks: object, asks_not: object
    ) -> None:
        error = tiny.refusal(BODIES[path] | {field: asks}, path)
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")
        for value in (None, asks_not):
            assert tiny.http.post(path, json=BODIES[path] | {field: value}).status_code == 200

    def test_parts_of_messages_are_refused_by_name(self, tiny: Server) -> None:
        error = tiny.refusal(message(role="assistant", audio={"id": "a"}), CHAT)
        assert (error["param"], error["code"]) == ("messages[0].audio", "unsupported_parameter")
        error = tiny.refusal(message(content=[TEXT | {"prompt_cache_breakpoint": {"mode": "explicit"}}]), CHAT)
        assert error["param"] == "messages[0].content[0].prompt_cache_breakpoint"

    @PATHS
    def test_stream_options_without_a_stream_are_refused(self, tiny: Server, path: str) -> None:
        error = tiny.refusal(BODIES[path] | {"stream_options": {"include_usage": True}}, path)
        assert error["param"] == "stream_options"

    def test_through_the_client_it_is_a_bad_request(self, tiny: Server) -> None:
        with tiny.openai() as client, pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="a", suffix="b")
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "suffix")


class TestTooLarge:
    """The default limit is 4 MiB."""

    @PATHS
    def test_bodies_are_refused(self, tiny: Server, path: str) -> None:
        error = tiny.refusal(path=path, content=b'{"prompt": "' + b"a" * (4 * 2**20) + b'"}', status=413)
        assert error["code"] == "body_too_large"
        assert "limits.max_body_bytes" in error["message"]

    def test_chunked_bodies_are_refused(self, tiny: Server) -> None:
        chunks = iter([b'{"prompt": "', *([b"a" * 2**16] * 65), b'"}'])
        assert tiny.refusal(content=chunks, status=413)["code"] == "body_too_large"

    def test_bodies_are_refused_before_they_are_read(self, tiny: Server) -> None:
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=300) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 10000000000\r\n\r\n{")
            assert client.recv(4096).startswith(b"HTTP/1.1 413 ")

    def test_chunked_bodies_without_an_end_are_refused_at_the_limit(self, tiny: Server) -> None:
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=300) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(65):
                client.sendall(b"10000\r\n" + b"a" * 2**16 + b"\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 413 ")

    def test_bodies_just_below_are_read(self, tiny: Server) -> None:
        content = b'{"prompt": "a", "max_tokens": 1'
        content += b" " * (4 * 2**20 - len(content) - 1) + b"}"
        assert len(content) == 4 * 2**20
        assert tiny.http.post(COMPLETIONS, content=content).status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = [
    *("model", "prompt", "messages", "temperature", "top_p", "top_k", "seed", "n", "stop", "stream", "stream_options"),
    *("return_token_ids", "user", "metadata", "store", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "best_of", "stop_token_ids", "include_stop_str_in_output", "min_tokens"),
    *("ignore_eos", "logprobs", "top_logprobs", "echo", *UNSUPPORTED),
    *("bad_words", "allowed_token_ids", "prompt_logprobs", "truncate_prompt_tokens", "skip_special_tokens"),
    *("return_tokens_as_token_ids", "cache_salt", "neurons"),
]
plausible = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=20) | st.lists(st.integers(0, 300), max_size=8) | json_values,
        "messages": st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from(["user", "assistant", "system", "x"]),
                    "content": st.text(max_size=9) | json_values,
                }
            ),
            max_size=3,
        )
        | json_values,
        "temperature": st.floats(0, 2) | json_values,
        "top_p": st.floats(0, 1) | json_values,
        "top_k": st.integers(-1, 300) | json_values,
        "seed": st.integers() | json_values,
        "n": st.integers(1, 3) | json_values,
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=4) | json_values,
        "stream": st.booleans() | json_values,
        "min_p": st.floats(0, 1) | json_values,
        "presence_penalty": st.floats(-2, 2) | json_values,
        "repetition_penalty": st.floats(0, exclude_min=True, allow_infinity=False) | json_values,
        "logit_bias": st.dictionaries(st.integers(0, 260).map(str), st.floats(-100, 100)) | json_values,
        "stop_token_ids": st.lists(st.integers(0, 260)) | json_values,
        "min_tokens": st.integers(0, 3) | json_values,
        "logprobs": st.integers(0, 20) | st.booleans() | json_values,
        "echo": st.booleans(),
        "bad_words": st.lists(st.text(max_size=3), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, 260), max_size=5),
        "prompt_logprobs": st.integers(-1, 21),
        "neurons": st.fixed_dictionaries({}, optional={"top": st.integers(0, 9) | json_values}) | json_values,
        "truncate_prompt_tokens": st.integers(-1, 5),
    },
)
anything = st.one_of(
    plausible,
    plausible,
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5),
    json_values,
    st.binary(max_size=40),
)


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(anything)
def test_nothing_that_a_client_sends_is_the_servers_fault(tiny: Server, body: object) -> None:
    for path in (COMPLETIONS, CHAT, "/v1/embeddings", "/tokenize", "/detokenize"):
        if isinstance(body, dict) and "completions" in path:
            body = body | {"max_tokens": 2}
        content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
        response = tiny.http.post(path, content=content)
        if response.status_code == 200:
            assert "error" not in response.json()
        else:
            assert response.status_code in (400, 404)
            tiny.error(response, response.status_code)


def test_what_is_not_http_is_refused(tiny: Server) -> None:
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01",
        b"NONSENSE\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=300) as client:
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            response = client.recv(4096)
            assert response == b"" or response.startswith(b"HTTP/1.1 4")


def test_a_request_cut_off_in_its_body_leaves_nothing_behind(tiny: Server) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=300) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{")
    tiny.until(lambda m: m["bdh_http_requests_in_flight"] <= 1)  # the scrape itself
