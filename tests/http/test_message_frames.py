"""Responses of the Messages API, of deltas that a server of tests cannot be brought to send."""

from __future__ import annotations

import json

import pytest

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.anthropic.content import input_object
from bdh_batch.http.anthropic.frames import PING, MessageFrames
from bdh_batch.http.anthropic.responses import AnthropicError
from bdh_batch.http.anthropic.translation import NAMES, MessageNames
from bdh_batch.http.responses.frames import COMMENT, ResponseOptions
from bdh_batch.messages import Delta, FinishReason, Usage
from bdh_batch.text.tokenizer import ByteTokenizer
from tests.http.message_events import in_order

OPTIONS = ResponseOptions(
    *("msg_1", 0, "tiny", "", 1, 1, False, None, False, None, False, False, "", False, False),
)


def frames(tools: list[str] | None = None) -> MessageFrames:
    return MessageFrames(OPTIONS, ByteTokenizer(), MessageNames(["system", "messages[0].content"], NAMES), tools)


def test_calls_that_an_upstream_sent_are_uses_of_tools() -> None:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    other = {"index": 1, "id": "call_1", "type": "function", "function": {"name": "g"}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    deltas = [
        Delta("So:", [1], extras=[{"delta": {"reasoning_content": "Hm."}}, {"delta": {"tool_calls": [first]}}]),
        Delta("", [1], extras=[{"delta": {"tool_calls": [rest]}}]),
        Delta("", [1], extras=[{"delta": {"tool_calls": [other]}}]),
        Delta(finish_reason=FinishReason.STOP),
    ]
    stream = frames()
    sent = [stream.opening([]), *(frame for delta in deltas for frame in stream.delta(0, delta))]
    sent.append(stream.closing(Usage(3, 3)))
    found = [json.loads(line[6:]) for line in b"".join(sent).decode().splitlines() if line.startswith("data: ")]
    in_order(found)
    assert found[-1]["type"] == "message_stop"
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    extras = [extra for delta in deltas for extra in delta.extras or ()]
    (end,) = [Delta("So:", [1] * 3, FinishReason.TOOL_CALLS, extras=extras)]
    whole = json.loads(b"".join(frames().whole([], Usage(3, 3), [end])))
    assert whole["content"] == [
        {"type": "text", "text": "So:"},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_1", "name": "g", "input": {}},
    ]
    assert whole["stop_reason"] == "tool_use"


def test_a_stream_that_fails_ends_with_an_error_about_the_clients_field() -> None:
    stream = frames()
    for param, named in (("messages[1].content", "messages[0].content"), ("stop[0]", "stop_sequences[0]")):
        error = stream.named(InvalidRequest(f"{param}: No.", param))
        event, data = stream.failed(error).decode().strip().split("\n")
        assert event == "event: error"
        reported = AnthropicError.model_validate_json(data.removeprefix("data: "))
        assert (reported.error.param, reported.error.message) == (named, f"{named}: No.")
        assert reported.request_id == "1"


@pytest.mark.parametrize(("prompt", "cached", "computed"), [(5, 2, 3), (5, 9, 0)])
def test_cached_tokens_are_no_input_tokens(prompt: int, cached: int, computed: int) -> None:
    whole = json.loads(b"".join(frames().whole([], Usage(prompt, 1, cached), [Delta("a", [1], FinishReason.STOP)])))
    assert whole["usage"] == {
        "input_tokens": computed,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": 1,
    }


def test_a_silence_is_a_ping_once_the_message_has_begun() -> None:
    stream = frames()
    assert stream.keepalive == COMMENT
    stream.opening([])
    assert stream.keepalive == PING


def test_what_was_left_out_of_a_schema_is_reported() -> None:
    warnings = [{"param": "tools[0].input_schema", "path": "/a", "keyword": "b", "text": "c"}]
    stream = frames()
    stream.warn([warnings[0] | {"param": "tools[0].function.parameters"}])
    assert json.loads(stream.opening([]).decode().splitlines()[1][6:])["message"]["warnings"] == warnings
    whole = b"".join(stream.whole([], Usage(1, 1), [Delta("a", [1], FinishReason.STOP)]))
    assert json.loads(whole)["warnings"] == warnings


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('{"a": 12345678901234567890123, "b": 0.10}', b'{"a": 12345678901234567890123, "b": 0.10}'),
        ('{"a": 1, "b": [2, "x', b'{"a": 1, "b": [2]}'),
        ('{"a": 1', b'{"a": 1}'),
        ("", b"{}"),
        ("[1]", b'{"arguments":"[1]"}'),
        ('{"a": NaN}', b'{"arguments":"{\\"a\\": NaN}"}'),
    ],
)
def test_what_a_model_wrote_for_arguments_is_an_object(text: str, written: bytes) -> None:
    assert input_object(text) == written
