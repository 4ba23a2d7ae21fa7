"""/v1/messages as Anthropic's official client sees it, and what is refused there."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from pydantic import BaseModel

from bdh_batch.http.anthropic.responses import AnthropicError

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PATH, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
KEYS = ("key-1-of-two", "key-2-of-two")
USER: Any = {"role": "user", "content": "Speak, é!"}
SCHEMA: Any = {
    "type": "object",
    "properties": {"who": {"enum": ["Romeo", "Juliet"]}},
    "required": ["who"],
    "additionalProperties": False,
}
ENTER: Any = {"name": "enter", "description": "Somebody enters.", "input_schema": SCHEMA}
ENTER_OF_CHAT = {
    "type": "function",
    "function": {"name": "enter", "description": "Somebody enters.", "parameters": SCHEMA},
}
USE: Any = {"type": "tool_use", "id": "toolu_1", "name": "enter", "input": {"who": "Romeo"}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Here."}]}
GREEDY: Any = {"model": "tiny", "max_tokens": 24, "temperature": 0}
# The same for the client, which has no such parameter any more.
ASKED: Any = {"model": "tiny", "max_tokens": 24, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=tiny.url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(serve: ServeFactory) -> Iterator[Server]:
    """Asks for keys, and has small limits."""
    limits = ("limits.max_stop=1", "limits.max_body_bytes=100000", "limits.max_messages=2", "limits.max_tools=1")
    auth = ("auth.enabled=true", f"auth.api_keys={','.join(KEYS)}", "server.cors_origins=https://example.org")
    with serve(*auth, *limits, "model.max_model_len=64", model=TINY) as server:
        yield server


def chat(tiny: Server, **body: Any) -> dict[str, Any]:
    """The response to a chat that says the same."""
    response = tiny.http.post(CHAT, json=GREEDY | body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events(tiny: Server, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream that must end well."""
    response = tiny.http.post(PATH, json=GREEDY | body | {"stream": True})
    assert response.status_code == 200, response.text
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert found[-1]["type"] == "message_stop"
    return found


def refusal(server: Server, body: Any, status: int = 400, path: str = PATH, **request: Any) -> dict[str, Any]:
    """The error of a request; it must be as Anthropic's are."""
    response = server.http.post(path, **({"json": body} | request))
    assert response.status_code == status, response.text
    AnthropicError.model_validate_json(response.content)
    reported: dict[str, Any] = response.json()
    assert reported["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    return dict(reported["error"])


class TestMessages:
    def test_a_response_is_a_typed_message_that_says_what_chat_says(
        self, client: anthropic.Anthropic, tiny: Server
    ) -> None:
        message = client.messages.create(
            **ASKED,
            system=[{"type": "text", "text": "You are "}, {"type": "text", "text": "Romeo."}],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "Speak, "}, {"type": "text", "text": "é!"}]}
            ],
            metadata={"user_id": "u"},
            thinking={"type": "disabled"},
            service_tier="auto",
        )
        same = chat(tiny, messages=[{"role": "system", "content": "You are Romeo."}, USER])
        assert isinstance(message, anthropic.types.Message)
        assert (message.role, message.type, message.model) == ("assistant", "message", "tiny")
        assert message.id == f"msg_{message._request_id}"
        assert [block.model_dump(exclude_none=True) for block in message.content] == [
            {"type": "text", "text": same["choices"][0]["message"]["content"]}
        ]
        assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
        usage = message.usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == same["usage"]["prompt_tokens"]
        assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 24)

    async def test_the_async_client_streams_the_same(self, client: anthropic.Anthropic, tiny: Server) -> None:
        whole = client.messages.create(**ASKED, messages=[USER])
        async with (
            anthropic.AsyncAnthropic(base_url=tiny.url, api_key="none", max_retries=0, timeout=300) as streams,
            streams.messages.stream(**ASKED, messages=[USER]) as stream,
        ):
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
        assert whole.content[0].type == "text"
        assert text == whole.content[0].text
        assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)

    def test_events_come_in_their_order_with_the_usage_in_the_first_and_the_last(self, tiny: Server) -> None:
        first, *_, last, _ = events(tiny, messages=[USER])
        message = first["message"]
        assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
        assert message["usage"]["output_tokens"] == 0
        assert last["usage"] == message["usage"] | {"output_tokens": 24}
        assert last["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}

    def test_the_stop_sequence_that_ended_it_is_reported(self, client: anthropic.Anthropic, tiny: Server) -> None:
        text = chat(tiny, messages=[USER])["choices"][0]["message"]["content"]
        stop = text[5:8]
        asked: Any = {"messages": [USER], "stop_sequences": ["never", stop]}
        message = client.messages.create(**ASKED, **asked)
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert "".join(block.to_dict()["text"] for block in message.content) == text[: text.index(stop)]
        assert events(tiny, **asked)[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}

    def test_what_the_assistant_said_last_is_continued(self, client: anthropic.Anthropic, tiny: Server) -> None:
        messages: list[Any] = [USER, {"role": "assistant", "content": [{"type": "text", "text": "I will"}]}]
        message = client.messages.create(**ASKED, messages=messages)
        last = {"role": "assistant", "content": "I will"}
        same = chat(tiny, messages=[USER, last], continue_final_message=True)
        assert message.content[0].type == "text"
        assert message.content[0].text == same["choices"][0]["message"]["content"]

    def test_a_response_can_be_parsed_into_a_type(self, client: anthropic.Anthropic) -> None:
        class Entrance(BaseModel):
            sure: bool
            times: bool

        message = client.messages.parse(**ASKED | {"max_tokens": 80}, messages=[USER], output_format=Entrance)
        assert isinstance(message.parsed_output, Entrance)
        assert message.stop_reason == "end_turn"

    def test_a_key_may_come_in_either_header_but_not_two(self, guarded: Server) -> None:
        body = {"messages": [USER], "max_tokens": 1}
        with anthropic.Anthropic(base_url=guarded.url, api_key=KEYS[0]) as client:
            assert client.messages.create(model="tiny", **body).usage.output_tokens == 1  # type: ignore[call-overload]
        for headers, status in (
            ({"authorization": f"Bearer {KEYS[1]}", "anthropic-version": "2023-06-01"}, 200),
            ({"authorization": f"Bearer {KEYS[1]}", "x-api-key": KEYS[1]}, 200),
            ({"authorization": "Basic YTpi", "x-api-key": KEYS[1]}, 200),
            ({"authorization": f"Bearer {KEYS[1]}", "x-api-key": KEYS[0]}, 401),
            ({"x-api-key": "wrong"}, 401),
            ({}, 401),
        ):
            assert guarded.http.post(PATH, json=body, headers=headers).status_code == status, headers
        assert guarded.http.post(CHAT, json=body, headers={"x-api-key": KEYS[0]}).status_code == 200


class TestTools:
    def test_a_tool_is_used_and_its_result_goes_back(self, client: anthropic.Anthropic, tiny: Server) -> None:
        asked: Any = ASKED | {"max_tokens": 200, "messages": [USER], "tools": [ENTER]}
        choice: Any = {"type": "any", "disable_parallel_tool_use": True}
        message = client.messages.create(**asked, tool_choice=choice)
        (use,) = message.content
        assert use.type == "tool_use"
        assert (use.name, message.stop_reason) == ("enter", "tool_use")
        assert use.id.startswith("toolu_")
        assert use.input in ({"who": "Romeo"}, {"who": "Juliet"})
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "Here.", "is_error": True}
        turns: list[Any] = [USER, {"role": "assistant", "content": message.content}]
        turns.append({"role": "user", "content": [result, {"type": "text", "text": "Go on."}]})
        after = client.messages.create(**ASKED | {"messages": turns, "tools": [ENTER]}, tool_choice={"type": "none"})
        call = {"name": "enter", "arguments": json.dumps(use.input)}
        same = chat(
            tiny,
            messages=[
                USER,
                {"role": "assistant", "tool_calls": [{"id": use.id, "type": "function", "function": call}]},
                {"role": "tool", "tool_call_id": use.id, "content": "Error: Here."},
                {"role": "user", "content": "Go on."},
            ],
            tools=[ENTER_OF_CHAT],
            tool_choice="none",
        )
        assert after.content[0].type == "text"
        assert after.content[0].text == same["choices"][0]["message"]["content"]

    def test_inputs_are_streamed_piece_by_piece(self, client: anthropic.Anthropic, tiny: Server) -> None:
        asked: Any = {"max_tokens": 200, "messages": [USER], "tools": [ENTER, ENTER | {"name": "leave"}]}
        asked |= {"tool_choice": {"type": "tool", "name": "leave"}}
        stream = events(tiny, **asked)
        (begin,) = [event for event in stream if event["type"] == "content_block_start"]
        deltas = [event["delta"] for event in stream if event["type"] == "content_block_delta"]
        assert begin["content_block"].items() >= {"type": "tool_use", "name": "leave", "input": {}}.items()
        assert {delta["type"] for delta in deltas} == {"input_json_delta"}
        assert len(deltas) > 1
        assert stream[-2]["delta"]["stop_reason"] == "tool_use"
        whole = client.messages.create(**ASKED | asked)
        assert whole.content[0].type == "tool_use"
        assert json.loads("".join(delta["partial_json"] for delta in deltas)) == whole.content[0].input
        with client.messages.stream(**ASKED | asked) as helper:
            assert helper.get_final_message().content[0].to_dict()["input"] == whole.content[0].input

    def test_a_use_that_is_cut_short_has_an_object_for_its_input(self, client: anthropic.Anthropic) -> None:
        begin = len('<tool_call>{"name": "enter", "arguments": {"who": "J')
        asked: Any = ASKED | {"max_tokens": begin, "messages": [USER], "tools": [ENTER]}
        message = client.messages.create(**asked, tool_choice={"type": "any"})
        assert message.stop_reason == "max_tokens"
        assert message.content[0].type == "tool_use"
        assert message.content[0].input == {}


class TestCountTokens:
    def test_counts_the_tokens_that_a_message_would_have(self, client: anthropic.Anthropic, tiny: Server) -> None:
        messages: list[Any] = [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}]
        counted = client.messages.count_tokens(model="tiny", system="Hear.", messages=messages, tools=[ENTER])
        function = {"name": "enter", "arguments": USE["input"]}
        same = chat(
            tiny,
            messages=[
                {"role": "system", "content": "Hear."},
                USER,
                {"role": "assistant", "tool_calls": [{"id": "toolu_1", "type": "function", "function": function}]},
                {"role": "tool", "tool_call_id": "toolu_1", "content": "Here."},
            ],
            tools=[ENTER_OF_CHAT],
        )
        assert counted.input_tokens == same["usage"]["prompt_tokens"]

    def test_takes_only_what_it_counts(self, tiny: Server) -> None:
        assert refusal(tiny, {"messages": [USER], "max_tokens": 1}, path=COUNT)["param"] == "max_tokens"
        assert refusal(tiny, {"messages": []}, path=COUNT)["param"] == "messages"


def block(role: str, **content: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": role, "content": [content]}]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{**ENTER, **fields}]}


DEEP: dict[str, Any] = functools.reduce(lambda inner, _: {"a": inner}, range(40), {})
LOOKAHEAD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)"}}}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "5"}),
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages[0].role", {"messages": [{"role": "system", "content": "a"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[1].content[0].text", block("user", type="text")),
    ("messages[1].content[0].text", block("user", **RESULT, text="a")),
    ("messages[1].content[0].id", block("assistant", **USE | {"id": None})),
    ("messages[1].content[0].input", block("assistant", **USE | {"input": "{}"})),
    ("messages[1].content[0].tool_use_id", block("user", type="tool_result")),
    ("messages[1].content[0].content[0].text", block("user", **RESULT | {"content": [{"type": "text"}]})),
    ("messages[1].content[0]", block("user", **USE)),
    ("messages[1].content[0]", block("assistant", **RESULT)),
    ("messages[1].content[0]", block("assistant", **USE)),
    ("temperature", {"temperature": 1.5}),
    ("top_p", {"top_p": 2}),
    ("top_k", {"top_k": -1}),
    ("stop_sequences", {"stop_sequences": "a"}),
    ("stop_sequences[1]", {"stop_sequences": ["a", ""]}),
    ("system", {"system": 1}),
    ("system[0].text", {"system": [{"type": "text"}]}),
    ("tools[0].name", tool(name="a b")),
    ("tools[0].input_schema", tool(input_schema=None)),
    ("tools[0].input_schema", tool(input_schema={"type": "string"})),
    ("tools[0].input_schema", tool(input_schema={"type": "object", "not": {}})),
    ("tools[1]", {"tools": [ENTER, ENTER]}),
    ("tool_choice", {"tool_choice": {"type": "any"}}),
    ("tool_choice.type", tool() | {"tool_choice": {"type": "some"}}),
    ("tool_choice.name", tool() | {"tool_choice": {"type": "tool"}}),
    ("tool_choice.name", tool() | {"tool_choice": {"type": "tool", "name": "none"}}),
    ("tool_choice.name", tool() | {"tool_choice": {"type": "any", "name": "enter"}}),
    ("output_config.format.schema", {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}),
    ("messages[1].content", {"messages": [USER, {"role": "assistant", "content": [USE | {"input": DEEP}]}, USER]}),
    ("messages[1].content", {"messages": [USER, {"role": "assistant", "content": [USE] * 200}, USER]}),
    ("tools[0].input_schema", tool(input_schema=DEEP)),
    ("output_config.format.schema", {"output_config": {"format": {"type": "json_schema", "schema": LOOKAHEAD}}}),
    ("metadata.user_id", {"metadata": {"user_id": 1}}),
    ("spare", {"spare": 1}),
    ("n", {"n": 2}),
]
HOUR = {"type": "ephemeral", "ttl": "1h"}
UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    ("thinking", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("cache_control", {"cache_control": HOUR}),
    ("mcp_servers", {"mcp_servers": [{"type": "url", "url": "https://example.org", "name": "a"}]}),
    ("service_tier", {"service_tier": "priority"}),
    ("container", {"container": "a"}),
    ("thread", {"thread": {"type": "create"}}),
    ("fallbacks", {"fallbacks": [{"model": "a"}]}),
    ("output_config.effort", {"output_config": {"effort": "low"}}),
    ("system[0].cache_control", {"system": [{"type": "text", "text": "a", "cache_control": HOUR}]}),
    ("messages[1].content[0].cache_control", block("user", type="text", text="a", cache_control=HOUR)),
    ("messages[1].content[0]", block("user", type="image", source={"type": "url", "url": "https://example.org"})),
    ("messages[1].content[0]", block("user", type="document", source={})),
    ("messages[1].content[0]", block("assistant", type="thinking", thinking="", signature="")),
    ("messages[1].content[0].content[0]", block("user", **RESULT | {"content": [{"type": "image", "source": {}}]})),
    ("tools[0].cache_control", tool(cache_control=HOUR)),
    ("tools[0].input_examples", tool(input_examples=[{}])),
    ("tools[0]", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
]


class TestErrors:
    @pytest.mark.parametrize(("param", "fields"), BAD)
    def test_bad_input_is_refused_by_its_field(self, tiny: Server, param: str, fields: dict[str, Any]) -> None:
        error = refusal(tiny, {"messages": [USER], "max_tokens": 4} | fields)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert not [word for word in (".function", "without strict") if word in error["message"]]

    @pytest.mark.parametrize(("param", "fields"), UNSUPPORTED)
    def test_what_is_not_built_is_refused_by_its_name(self, tiny: Server, param: str, fields: dict[str, Any]) -> None:
        error = refusal(tiny, {"messages": [USER], "max_tokens": 4} | fields)
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")

    def test_fields_that_ask_for_nothing_are_accepted(self, tiny: Server) -> None:
        neutral: dict[str, Any] = {"mcp_servers": [], "thinking": None, "service_tier": "standard_only", "spare": None}
        body = {"messages": [USER], "max_tokens": 1} | neutral
        assert tiny.http.post(PATH, json=body).status_code == 200

    def test_prefixes_that_should_be_cached_are_in_any_case(self, tiny: Server) -> None:
        cached = {"cache_control": {"type": "ephemeral"}}
        text = [{"type": "text", "text": "a", **cached}]
        body = {"messages": [{"role": "user", "content": text}], "system": text, "max_tokens": 1, **cached}
        assert tiny.http.post(PATH, json=body | tool(**cached)).status_code == 200

    def test_the_client_raises_them_by_their_classes(self, client: anthropic.Anthropic, guarded: Server) -> None:
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(model="tiny", max_tokens=4, extra_body={"temperature": 2}, messages=[USER])
        assert caught.value.request_id
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["message"].startswith("temperature: ")
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="none", max_tokens=4, messages=[USER])
        with (
            pytest.raises(anthropic.BadRequestError),
            client.messages.stream(max_tokens=0, model="tiny", messages=[USER]),
        ):
            pass
        with (
            anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0) as wrong,
            pytest.raises(anthropic.AuthenticationError),
        ):
            wrong.messages.create(model="tiny", max_tokens=4, messages=[USER])

    def test_limits_are_named_with_the_clients_fields(self, guarded: Server) -> None:
        headers, body = {"x-api-key": KEYS[0]}, {"messages": [USER], "max_tokens": 4}
        for param, option, fields in (
            ("stop_sequences", "limits.max_stop", {"stop_sequences": ["a", "b"]}),
            ("messages", "limits.max_messages", {"messages": [USER] * 3}),
            ("messages", "limits.max_messages", {"system": "a", "messages": [USER] * 2}),
            ("tools", "limits.max_tools", {"tools": [ENTER, ENTER]}),
        ):
            error = refusal(guarded, body | fields, headers=headers)
            assert (error["param"], option in error["message"]) == (param, True)
        error = refusal(guarded, body | {"max_tokens": 60}, headers=headers)
        assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
        error = refusal(guarded, body | {"messages": [{"role": "user", "content": "a" * 90}]}, headers=headers)
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
        too_large = {"messages": [{"role": "user", "content": "a" * 100_000}], "max_tokens": 1}
        assert refusal(guarded, too_large, 413, headers=headers)["type"] == "request_too_large"

    def test_each_has_the_shape_of_the_api_that_was_asked(self, tiny: Server) -> None:
        assert refusal(tiny, {}, 404, path="/v1/messages/batches")["type"] == "not_found_error"
        assert refusal(tiny, None, 400, content=b"{")["code"] == "invalid_json"
        assert refusal(tiny, None, 415, content=b"{}", headers={"content-type": "text/plain"})["param"] is None
        assert tiny.http.get(PATH).json()["error"]["code"] == "method_not_allowed"
        assert "request-id" not in tiny.http.get("/health").headers
