"""Chat responses that may call tools: the calls are reported as OpenAI's `tool_calls`, whole or piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson

from bdh_batch.http.responses.frames import ChatFrames, ResponseOptions
from bdh_batch.messages import Delta, FinishReason, Usage
from bdh_batch.text.calls import Argued, Called, CallReader, Piece, Said
from bdh_batch.text.tokenizer import Tokenizer


class ToolFrames(ChatFrames):
    """Encodes chat responses that may contain tool calls."""

    def __init__(self, options: ResponseOptions, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        super().__init__(options, tokenizer)
        self._names = names
        self._readers: dict[int, CallReader] = {}

    def delta(self, index: int, delta: Delta) -> list[bytes]:
        if (reader := self._readers.get(index)) is None:
            reader = self._readers[index] = CallReader(self._names)
        pieces = reader.push(delta.text)
        if delta.finish_reason is not None:
            pieces += reader.flush()
        said = "".join(piece.text for piece in pieces if isinstance(piece, Said))
        # What was said comes before any call; the tokens, which frames may show, go with it.
        frames = super().delta(index, delta.replaced(text=said, finish_reason=None))
        frames += [self._frame(index, _call_delta(piece)) for piece in pieces if not isinstance(piece, Said)]
        if delta.finish_reason is not None:
            frames += super().delta(index, Delta(finish_reason=_reason(delta.finish_reason, reader)))
        return frames

    def whole(self, prompts: Sequence[Sequence[int]], usage: Usage, ends: Sequence[Delta]) -> list[bytes]:
        finished = []
        for end in ends:
            reader = self._read(end.text)[1]
            assert end.finish_reason is not None
            finished.append(end.replaced(finish_reason=_reason(end.finish_reason, reader)))
        return super().whole(prompts, usage, finished)

    def _whole_content(self, text: str) -> dict[str, Any]:
        pieces, _ = self._read(text)
        said = self._options.said + "".join(piece.text for piece in pieces if isinstance(piece, Said))
        calls = [_function(piece.name) for piece in pieces if isinstance(piece, Called)]
        for piece in pieces:
            if isinstance(piece, Argued):
                calls[piece.index]["function"]["arguments"] += piece.text
        message = {"role": "assistant", "content": said, "refusal": None}
        return {"message": message | {"content": said or None, "tool_calls": calls} if calls else message}

    def _read(self, text: str) -> tuple[list[Piece], CallReader]:
        reader = CallReader(self._names)
        return reader.push(text) + reader.flush(), reader


def _reason(reason: FinishReason, reader: CallReader) -> FinishReason:
    stopped_after_a_call = reason is FinishReason.STOP and reader.calls > 0 and not reader.inside
    return FinishReason.TOOL_CALLS if stopped_after_a_call else reason


def _function(name: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def _call_delta(piece: Called | Argued) -> bytes:
    call: dict[str, Any] = {"index": piece.index}
    call |= _function(piece.name) if isinstance(piece, Called) else {"function": {"arguments": piece.text}}
    return b'"delta":{"tool_calls":' + orjson.dumps([call]) + b'},"logprobs":null,"finish_reason":null'
