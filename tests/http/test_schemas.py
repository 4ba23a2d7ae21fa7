"""Schemas and tools as real clients send them, over HTTP: what is accepted, and how what is left out is reported."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from bdh_batch.http.request.body import parse
from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.settings import Limits
from tests.text.test_schemas import tools_of

if TYPE_CHECKING:
    from tests.conftest import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "x"}
UNIQUE = {"type": "array", "items": {"const": 1}, "uniqueItems": True, "maxItems": 2}
WARNING = {
    "path": "#/uniqueItems",
    "keyword": "uniqueItems",
    "text": "uniqueItems cannot be enforced while generating.",
}


def offered(name: str, parameters: dict[str, Any] | None = None, **function: Any) -> dict[str, Any]:
    schema = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **schema, **function}}


def named(schema: Any, **others: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema, **others}}}


ASKED: list[tuple[str, str, dict[str, Any]]] = [
    (COMPLETIONS, "structured_outputs.json", {"prompt": "x", "structured_outputs": {"json": UNIQUE}}),
    (COMPLETIONS, "response_format.json_schema.schema", {"prompt": "x", **named(UNIQUE)}),
    (CHAT, "guided_json", {"messages": [USER], "guided_json": json.dumps(UNIQUE)}),
    (CHAT, "response_format.json_schema.schema", {"messages": [USER], **named(UNIQUE, strict=False), "n": 2}),
    (CHAT, "response_format.json_schema.schema", {"messages": [USER], **named(UNIQUE), "return_token_ids": True}),
    (CHAT, "response_format.json_schema.schema", {"messages": [USER], **named(UNIQUE), "tools": [offered("f")]}),
]


@pytest.mark.parametrize(("path", "param", "body"), ASKED)
def test_what_is_left_out_is_in_the_response_and_with_a_streams_first_event(
    tiny: Server, path: str, param: str, body: dict[str, Any]
) -> None:
    body |= {"max_tokens": 30, "seed": 1}
    whole = tiny.http.post(path, json=body)
    assert whole.status_code == 200, whole.text
    assert whole.json()["warnings"] == [{"param": param, **WARNING}]
    events = tiny.events(path, **body, stream_options={"include_usage": True})
    assert events[0]["warnings"] == whole.json()["warnings"]
    assert events[0]["choices"]
    assert not any("warnings" in event for event in events[1:])


def test_without_anything_left_out_there_are_no_warnings(tiny: Server) -> None:
    body = {"prompt": "x", "max_tokens": 5, "structured_outputs": {"json": {"enum": [1]}}}
    assert "warnings" not in tiny.complete(**body)
    assert not any("warnings" in event for event in tiny.events(COMPLETIONS, **body))


def test_a_tool_that_is_strict_is_refused_by_keyword_and_one_that_is_not_is_counted(tiny: Server) -> None:
    tools = [offered("a", {"type": "object", "properties": {"x": {"const": 1}}}, strict=True)]
    tools.append(offered("b", {"type": "object", "properties": {"x": UNIQUE}, "required": ["x"]}, strict=True))
    body: dict[str, Any] = {"messages": [USER], "tools": tools, "max_tokens": 1}
    error = tiny.refusal(body, CHAT)
    assert error["param"] == "tools[1].function.parameters"
    assert "#/properties/x/uniqueItems: uniqueItems cannot be enforced" in error["message"]
    tools[1]["function"]["strict"] = False
    metric = "bdh_schema_keywords_left_out_total{keyword=uniqueItems}"
    before = tiny.metrics().get(metric, 0)
    response = tiny.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    (warning,) = response.json()["warnings"]
    assert (warning["param"], warning["path"]) == ("tools[1].function.parameters", "#/properties/x/uniqueItems")
    assert tiny.metrics()[metric] == before + 1


def all_tools(server: str, choice: str) -> dict[str, Any]:
    tools = [offered(each["name"], each["inputSchema"], description=each["description"]) for each in tools_of(server)]
    return {"messages": [USER], "tools": tools, "tool_choice": choice, "seed": 3}


@pytest.mark.parametrize("choice", ["auto", "any"])
def test_all_tools_of_a_widely_used_server_are_accepted_at_once(tiny: Server, choice: str) -> None:
    body = all_tools("playwright", choice) | {"max_tokens": 80 if choice == "any" else 1}
    response = tiny.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert "warnings" not in response.json()
    (made,) = response.json()["choices"]
    if choice == "any":
        (call, *_) = made["message"]["tool_calls"]
        assert call["function"]["name"] in {each["name"] for each in tools_of("playwright")}


def test_the_largest_are_within_the_bounds_of_the_defaults() -> None:
    body = json.dumps(all_tools("notion", "required")).encode()
    source = parse(body, ChatBody, Limits()).source()
    assert source is not None
    assert len(body) > 75_000
    assert source.written(Limits().max_schema_bytes)


def test_an_object_follows_the_schema_beside_it(tiny: Server) -> None:
    response_format = {"type": "json_object", "schema": {"properties": {"a": {"const": 1}}, "required": ["a"]}}
    response = tiny.http.post(CHAT, json={"messages": [USER], "response_format": response_format, "max_tokens": 30})
    assert json.loads(response.json()["choices"][0]["message"]["content"]) == {"a": 1}


def test_names_may_have_dots_and_128_characters(tiny: Server) -> None:
    name = "repo.issues.list-" + "x" * 111
    body = {"messages": [USER], "tools": [offered(name)], "tool_choice": "any", "max_tokens": 250}
    body["parallel_tool_calls"] = False
    (call,) = tiny.http.post(CHAT, json=body).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": name, "arguments": "{}"}
    one = {"type": "function", "function": {"name": name}}
    assert tiny.http.post(CHAT, json={**body, "tool_choice": one, "max_tokens": 1}).status_code == 200
    error = tiny.refusal({**body, "tools": [offered(name + "x")]}, CHAT)
    assert error["param"] == "tools[0].function.name"


def test_a_functions_message_is_a_tools_to_the_template(tiny: Server) -> None:
    messages = [USER, {"role": "function", "name": "f", "content": "rain"}]
    response = tiny.http.post(CHAT, json={"messages": messages, "max_tokens": 1, "return_token_ids": True})
    assert response.status_code == 200, response.text
    assert bytes(response.json()["prompt_token_ids"]).decode() == "user: x\ntool: rain\nassistant:"


def test_strict_is_what_the_body_says() -> None:
    for strict in (None, False, True):
        source = CompletionBody.model_validate({"prompt": "x", **named({"const": 1}, strict=strict)}).source()
        assert source is not None
        assert source.value == [{"const": 1}, bool(strict)]
