"""Answers as bytes, in OpenAI's shapes: whole, or as SSE frames of which only what changes is encoded per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from bdh_batch.errors import BDHError
from bdh_batch.http.errors import describe
from bdh_batch.messages import Delta, Usage

DONE = b"data: [DONE]\n\n"


def error_frame(error: BDHError) -> bytes:
    _, body = describe(error)
    return b"data: " + orjson.dumps(body) + b"\n\n"


@dataclass(frozen=True)
class Answer:
    """What is the same in all frames of one request."""

    id: str
    created: int
    model: str
    fingerprint: str
    n: int  # answers to each prompt
    token_ids: bool  # return_token_ids
    include_usage: bool

    def envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class Frames:
    """One API's shapes. A stream is `opening`, then `delta`s, then `closing`; `whole` is all of it in one object."""

    kind: str
    chunk_kind: str

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        head = orjson.dumps(answer.envelope(self.chunk_kind))
        self._head = b"data: " + head[:-1] + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if answer.include_usage else b"}]}\n\n"
        self._usage_head = b"data: " + head[:-1] + b',"choices":[],"usage":'

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        """Frames before the first token."""
        raise NotImplementedError

    def delta(self, index: int, delta: Delta) -> bytes:
        """A frame for what sequence `index` gained; none where nothing of it can be shown yet."""
        if not (delta.text or delta.finish_reason or self._answer.token_ids):
            return b""
        reason = b'"%s"' % delta.finish_reason.encode() if delta.finish_reason else b"null"
        ids = b',"token_ids":' + orjson.dumps(delta.tokens) if self._answer.token_ids else b""
        return self._frame(index, self._content(delta.text) + b',"logprobs":null,"finish_reason":' + reason + ids)

    def closing(self, usage: Usage) -> bytes:
        if not self._answer.include_usage:
            return DONE
        return self._usage_head + orjson.dumps(usage_dict(usage)) + b"}\n\n" + DONE

    def usage(self, prompts: Sequence[Sequence[int]], cached: Sequence[int], completion_tokens: int) -> Usage:
        """A prompt counts once, however many answers it has, and as cached what its first answer was spared."""
        n = self._answer.n
        return Usage(sum(map(len, prompts)) // n, completion_tokens, cached_tokens=sum(cached[::n]))

    def whole(self, prompts: Sequence[Sequence[int]], cached: Sequence[int], ends: Sequence[Delta]) -> bytes:
        """The answer in one piece; `ends` holds all that each sequence gained."""
        choices = []
        for index, (prompt, end) in enumerate(zip(prompts, ends)):
            choice = {
                "index": index,
                **self._whole_content(end.text),
                "logprobs": None,
                "finish_reason": end.finish_reason,
            }
            if self._answer.token_ids:
                choice |= {"prompt_token_ids": list(prompt), "token_ids": end.tokens}
            choices.append(choice)
        usage = usage_dict(self.usage(prompts, cached, sum(len(end.tokens) for end in ends)))
        return orjson.dumps(self._answer.envelope(self.kind) | {"choices": choices, "usage": usage})

    def _frame(self, index: int, content: bytes) -> bytes:
        return b"%b%d,%b%b" % (self._head, index, content, self._tail)

    def _prompt_ids(self, prompt: Sequence[int]) -> bytes:
        return b',"prompt_token_ids":' + orjson.dumps(list(prompt)) if self._answer.token_ids else b""

    def _content(self, text: str) -> bytes:
        raise NotImplementedError

    def _whole_content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFrames(Frames):
    kind = chunk_kind = "text_completion"

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        if not self._answer.token_ids:
            return b""
        empty = self._content("") + b',"logprobs":null,"finish_reason":null,"token_ids":[]'
        return b"".join(self._frame(index, empty + self._prompt_ids(prompt)) for index, prompt in enumerate(prompts))

    def _content(self, text: str) -> bytes:
        return b'"text":' + orjson.dumps(text)

    def _whole_content(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFrames(Frames):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return b"".join(self._frame(index, role + self._prompt_ids(prompt)) for index, prompt in enumerate(prompts))

    def _content(self, text: str) -> bytes:
        return b'"delta":{"content":' + orjson.dumps(text) + b"}" if text else b'"delta":{}'

    def _whole_content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}
