"""Responses in the shape of the Messages API: one object, or the events that it is put together from.

A stream is message_start, the content blocks one after the other (content_block_start, content_block_delta …,
content_block_stop), message_delta and message_stop. An error event ends one that fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bdh_batch.errors import BDHError
from bdh_batch.http.anthropic.content import Content
from bdh_batch.http.errors import anthropic_error, describe
from bdh_batch.http.responses.frames import Frames, ResponseOptions
from bdh_batch.http.responses.json_pieces import between
from bdh_batch.http.schema.other_names import Names
from bdh_batch.messages import Delta, FinishReason, Usage
from bdh_batch.text.calls import Said
from bdh_batch.text.parts import Part, Parts, Uses
from bdh_batch.text.tokenizer import Tokenizer

STOP_REASONS = {
    FinishReason.LENGTH: "max_tokens",
    FinishReason.TOOL_CALLS: "tool_use",
    FinishReason.CONTENT_FILTER: "refusal",
}
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}\n\n'


def event(kind: str, **members: Any) -> bytes:
    """One server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **members}))


def message_usage(usage: Usage) -> dict[str, Any]:
    """As the API has it, tokens of the prompt that came from the prefix cache are not among the input tokens."""
    return {
        "input_tokens": max(0, usage.prompt_tokens - usage.cached_tokens),  # an upstream may say anything
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    } | ({"estimated": True} if usage.estimated else {})


class MessageFrames(Frames):
    """Encodes one response.

    Args:
        names: of the fields that errors are about.
        tools: as in `Parts`.
    """

    kind = chunk_kind = "message"
    before_text = after_text = b""
    continuous_usage = True  # the first event has it

    def __init__(
        self, options: ResponseOptions, tokenizer: Tokenizer, names: Names, tools: Sequence[str] | None
    ) -> None:
        super().__init__(options, tokenizer)
        self.only_text = tools is None
        self._names = names
        self._parts_of = Parts(tools, "toolu")
        self._blocks: dict[int, int] = {}  # indices of the blocks of the uses of tools
        self._next = 0  # the index of the next block
        self._open: Part | None = None  # what the block that has not ended began with
        self._usage = Usage(0, 0)
        self._end = Delta()
        self._left_out: list[Mapping[str, str]] = []

    def warn(self, warnings: Sequence[Mapping[str, str]]) -> None:
        self._left_out = [{**each, "param": self._names.field(each["param"])} for each in warnings]

    def with_warnings(self, pieces: list[bytes]) -> list[bytes]:
        return pieces  # they are in the first event

    def report_usage(self, usage: Usage) -> None:
        self._usage = usage

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        self.keepalive = PING
        message = {**self._head_of(), "content": [], "stop_reason": None, "stop_sequence": None}
        return event("message_start", message={**message, "usage": message_usage(self._usage), **self._warning()})

    def delta(self, index: int, delta: Delta) -> list[bytes]:
        frames: list[bytes] = []
        for part in self._parts_of.of(delta):
            frames += self._events(part)
        if delta.finish_reason is not None:
            self._end = delta
        return frames

    def closing(self, usage: Usage) -> bytes:
        ending = event("message_delta", delta=self._stop(self._end), usage=message_usage(usage))
        return b"".join([*self._close(), ending, event("message_stop")])

    def named(self, error: BDHError) -> BDHError:
        return self._names.of(error)

    def failed(self, error: BDHError) -> bytes:
        status, body = describe(error)
        problem = anthropic_error(status, body["error"], self._options.id.removeprefix("msg_"))
        return b"event: error\ndata: " + orjson.dumps(problem) + b"\n\n"

    def whole(self, prompts: Sequence[Sequence[int]], usage: Usage, ends: Sequence[Delta]) -> list[bytes]:
        (end,) = ends
        content = Content()
        for part in self._parts_of.of(end):
            content.add(part)
        rest = {**self._stop(end), "usage": message_usage(usage), **self._warning()}
        head = orjson.dumps(self._head_of())[:-1] + b',"content":['
        return [head, *between(b",", content.blocks()), b"],", orjson.dumps(rest)[1:]]

    def _head_of(self) -> dict[str, Any]:
        return {"id": self._options.id, "type": "message", "role": "assistant", "model": self._options.model}

    def _warning(self) -> dict[str, Any]:
        return {"warnings": self._left_out} if self._left_out else {}

    def _stop(self, end: Delta) -> dict[str, Any]:
        """Why the response ended."""
        reason = STOP_REASONS.get(end.finish_reason or FinishReason.STOP)
        if reason is not None or end.stop is None:
            return {"stop_reason": reason or self._ended_by_itself(), "stop_sequence": None}
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop}

    def _ended_by_itself(self) -> str:
        return "tool_use" if self._parts_of.ends_with_a_call else "end_turn"

    def _events(self, part: Part) -> list[bytes]:
        if isinstance(part, Said):
            frames = [] if isinstance(self._open, Said) else self._begin_block(part, {"type": "text", "text": ""})
            return [*frames, DELTA % (self._next - 1, b"text_delta", b"text", orjson.dumps(part.text))]
        if isinstance(part, Uses):
            self._blocks[part.index] = self._next
            return self._begin_block(part, {"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
        return [DELTA % (self._blocks[part.index], b"input_json_delta", b"partial_json", orjson.dumps(part.text))]

    def _begin_block(self, part: Part, block: dict[str, Any]) -> list[bytes]:
        frames = [*self._close(), event("content_block_start", index=self._next, content_block=block)]
        self._open, self._next = part, self._next + 1
        return frames

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [event("content_block_stop", index=self._next - 1)]
