"""Responses as bytes, in OpenAI's shapes: whole, or as SSE frames of which only what changes is encoded per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import orjson

from bdh_batch.errors import BDHError
from bdh_batch.http.errors import describe
from bdh_batch.http.responses.json_pieces import between, dump_list
from bdh_batch.http.responses.logprobs import by_id, columns, known, objects, of_prompt
from bdh_batch.http.responses.tokens import neurons
from bdh_batch.messages import Delta, Usage, merged
from bdh_batch.text.tokenizer import Tokenizer, decode

DONE = b"data: [DONE]\n\n"
NULL = b"null"
NEURON_BYTES = 8  # of values that are encoded in a microsecond, about
COMMENT = b": keep-alive\n\n"  # which is no event


@dataclass(frozen=True)
class ResponseOptions:
    """The options of a response that are the same in all frames of one request."""

    id: str
    created: int
    model: str
    fingerprint: str
    n: int  # choices for each prompt that are returned
    tries: int  # choices for each prompt that are computed; the likeliest are returned
    token_ids: bool  # return_token_ids
    logprobs: int | None  # likeliest tokens that are returned with each log-probability
    names_are_ids: bool  # return_tokens_as_token_ids
    prompt_logprobs: int | None  # likeliest tokens with each log-probability of the prompt's tokens
    special: bool  # whether texts show special tokens
    echo: bool
    said: str  # what each response of a chat begins with
    include_usage: bool
    continuous_usage: bool
    neurons: bool = False

    def envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def usage_dict(usage: Usage) -> dict[str, Any]:
    known = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        known["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return known | ({"estimated": True} if usage.estimated else {})


def _likelihood(end: Delta) -> float:
    return end.logprob / max(1, len(end.tokens))


class Frames:
    """One API's shapes. A stream is `opening`, then `delta`s, then `closing`; `whole` is all of it in one object."""

    kind: str
    chunk_kind: str
    before_text: bytes  # in the choice of a frame
    after_text: bytes
    keepalive = COMMENT  # what a stream sends where it has nothing else to send
    prompt_beside_choices = False  # where its token ids are: beside the choices, of which all have the same, or in each

    def __init__(self, options: ResponseOptions, tokenizer: Tokenizer) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._name = partial(by_id if options.names_are_ids else known, tokenizer)
        head = orjson.dumps(options.envelope(self.chunk_kind))
        self._head = b"data: " + head[:-1] + b',"choices":[{"index":'
        self._tail = b'}],"usage":null}\n\n' if options.include_usage else b"}]}\n\n"
        self._usage_head = b"data: " + head[:-1] + b',"choices":[],"usage":'
        self._warnings = b""
        asked = options.token_ids or options.neurons or options.echo or options.logprobs is not None
        self.only_text = not asked
        self._after_only_text = self.after_text + b',"logprobs":null,"finish_reason":null'

    def warn(self, warnings: Sequence[Mapping[str, str]]) -> None:
        """The response, or the first frame of a stream, reports what was left out of a schema."""
        self._warnings = b',"warnings":' + orjson.dumps(warnings) if warnings else b""

    def with_warnings(self, pieces: list[bytes]) -> list[bytes]:
        """Pieces of frames; if they are the first that are not empty, with the warnings."""
        for index, piece in enumerate(pieces) if self._warnings else ():
            if piece.startswith(b"data: {"):
                envelope, choices, rest = piece.partition(b',"choices":')
                pieces[index] = b"".join((envelope, self._warnings, choices, rest))
                self._warnings = b""
                break
        return pieces

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        """Frames before the first token."""
        raise NotImplementedError

    def delta(self, index: int, delta: Delta) -> list[bytes]:
        """The pieces of a frame for what sequence `index` gained; none where nothing of it can be shown yet."""
        if delta.extras:
            return self._beside_text(index, delta, delta.extras)
        if self.only_text and delta.text and delta.finish_reason is None:  # most are, and it costs less
            parts = (self._head, index, self.before_text, orjson.dumps(delta.text), self._after_only_text, self._tail)
            return [b"%b%d,%b%b%b%b" % parts]
        text, logprobs = self._parts(index, delta)
        shows = text or delta.finish_reason or delta.logprobs or delta.prompt_logprobs or delta.neurons
        if not (shows or self._options.token_ids):
            return []
        reason = b'"%s"' % delta.finish_reason.encode() if delta.finish_reason else b"null"
        ids = b',"token_ids":' + dump_list(delta.tokens) if self._options.token_ids else b""
        begin = b'%b%d,%b,"logprobs":' % (self._head, index, self._content(text))
        return [begin, *logprobs, b',"finish_reason":%b%b' % (reason, ids), *self._neurons(delta), self._tail]

    def _beside_text(self, index: int, delta: Delta, extras: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """The frames of a delta with members that an upstream sent: one for each, the first with the text."""
        frames, text = [], delta.text
        for extra in extras:
            content = self._content_with(text, extra.get("delta", {}))
            logprobs = orjson.dumps(extra.get("logprobs"))
            frames.append(self._frame(index, content + b',"logprobs":' + logprobs + b',"finish_reason":null'))
            text = ""
        return frames + self.delta(index, delta.replaced(text="", extras=None)) if delta.finish_reason else frames

    def cost(self, prompts: Sequence[Sequence[int]], deltas: Sequence[Delta]) -> int:
        """About how many microseconds it takes to encode `deltas`, with the `prompts` that are part of the response."""
        each = 1 + max(self._options.logprobs or 0, self._options.prompt_logprobs or 0)
        cost = sum(len(delta.tokens) for delta in deltas)
        cost += each * sum(len(delta.logprobs or ()) + len(delta.prompt_logprobs or ()) for delta in deltas)
        cost += sum(len(each.values) for delta in deltas for each in delta.neurons or ()) // NEURON_BYTES
        return cost + (sum(map(len, prompts)) if self._options.token_ids or self._options.echo else 0)

    @property
    def continuous_usage(self) -> bool:
        return self._options.continuous_usage

    def report_usage(self, usage: Usage) -> None:
        """From here on, every chunk has `usage`."""
        self._tail = b'}],"usage":' + orjson.dumps(usage_dict(usage)) + b"}\n\n"

    async def before_end(self, usage: Usage, ends: Sequence[Delta] = ()) -> None:
        """Is awaited once all is generated, before `closing`, or before `whole` with its `ends`."""

    def closing(self, usage: Usage) -> bytes:
        if not self._options.include_usage:
            return DONE
        return self._usage_head + orjson.dumps(usage_dict(usage)) + b"}\n\n" + DONE

    def named(self, error: BDHError) -> BDHError:
        """The same error, with the client's name of the field that it is about."""
        return error

    def failed(self, error: BDHError) -> bytes:
        """The frame that ends a stream which fails."""
        _, body = describe(error)
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def whole(self, prompts: Sequence[Sequence[int]], usage: Usage, ends: Sequence[Delta]) -> list[bytes]:
        """The response, in pieces; `ends` holds all that each sequence gained."""
        self._begin(prompts)
        choices = (self._choice(index, row, prompts[row], ends[row]) for index, row in enumerate(self._best(ends)))
        head = orjson.dumps(self._options.envelope(self.kind))[:-1] + self._warnings
        beside = self._of_prompt(prompts[0], ends[0]) if self.prompt_beside_choices else []
        end = b'],"usage":%b' % orjson.dumps(usage_dict(usage))
        return [head, b',"choices":[', *between(b",", choices), end, *beside, b"}"]

    def _choice(self, index: int, row: int, prompt: Sequence[int], end: Delta) -> list[bytes]:
        text, logprobs = self._parts(row, end)
        content = self._whole_content(text)
        if end.extras:
            extra = merged(end.extras)
            content = self._with_members(content, extra.get("delta", {}))
            logprobs = [orjson.dumps(extra.get("logprobs"))]
        begin = orjson.dumps({"index": index, **content})[:-1] + b',"logprobs":'
        reason = b',"finish_reason":' + orjson.dumps(end.finish_reason)
        ids = dump_list(end.tokens) if self._options.token_ids else NULL
        inside = [] if self.prompt_beside_choices else self._of_prompt(prompt, end)
        return [begin, *logprobs, reason, *inside, b',"token_ids":', ids, *self._neurons(end), b"}"]

    def first(self, ends: Sequence[Delta]) -> Delta:
        """What the choice gained that is returned first."""
        return ends[self._best(ends)[0]]

    def _best(self, ends: Sequence[Delta]) -> list[int]:
        """The rows of the choices that are returned: those of the highest log-probability per token, if not all."""
        n, tries = self._options.n, self._options.tries
        if n == tries:
            return list(range(len(ends)))
        return [
            row
            for first in range(0, len(ends), tries)
            for row in sorted(range(first, first + tries), key=lambda row: -_likelihood(ends[row]))[:n]
        ]

    def _frame(self, index: int, content: bytes, beside: bytes = b"") -> bytes:
        """A frame; `beside` are members that come after its choices."""
        closed, rest = self._tail[:2], self._tail[2:]
        return b"%b%d,%b%b%b%b" % (self._head, index, content, closed, beside, rest)

    def _of_prompt(self, prompt: Sequence[int], end: Delta) -> list[bytes]:
        """What a whole response has of a prompt, as members of an object."""
        logprobs, most = [NULL], self._options.prompt_logprobs
        if most is not None:
            logprobs = of_prompt(self._tokenizer, end.prompt_logprobs or (), most)
        ids = dump_list(prompt) if self._options.token_ids else NULL
        return [b',"prompt_logprobs":', *logprobs, b',"prompt_token_ids":', ids]

    def _neurons(self, delta: Delta) -> list[bytes]:
        """What a choice shows of the neurons of its tokens, where that was asked for; `[]` where there is no token."""
        return [b',"neurons":', *neurons(delta.neurons or ())] if self._options.neurons else []

    def _prompt_ids(self, prompt: Sequence[int]) -> bytes:
        return b',"prompt_token_ids":' + dump_list(prompt) if self._options.token_ids else b""

    def _begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Receives the prompts before any delta."""

    def _parts(self, index: int, delta: Delta) -> tuple[str, list[bytes]]:
        """The text and the log-probabilities, as pieces of JSON, that are shown for `delta`."""
        raise NotImplementedError

    def _content(self, text: str) -> bytes:
        return self.before_text + orjson.dumps(text) + self.after_text

    def _content_with(self, text: str, members: Mapping[str, Any]) -> bytes:
        """As `_content`, with members of a chat's delta that an upstream sent."""
        return self._content(text)

    def _whole_content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _with_members(self, content: dict[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
        """`content` of a whole response, with members of a chat's message that an upstream sent."""
        return content


class CompletionFrames(Frames):
    """Encodes the responses of /v1/completions."""

    kind = chunk_kind = "text_completion"
    before_text, after_text = b'"text":', b""

    def __init__(self, options: ResponseOptions, tokenizer: Tokenizer) -> None:
        super().__init__(options, tokenizer)
        self._unsaid: dict[int, Sequence[int]] = {}  # prompts that are still to be echoed
        self._bases: dict[int, int] = {}  # where completions begin in their texts

    def _begin(self, prompts: Sequence[Sequence[int]]) -> None:
        if self._options.echo:
            self._unsaid = dict(enumerate(prompts))

    def _parts(self, index: int, delta: Delta) -> tuple[str, list[bytes]]:
        if (prompt := self._unsaid.pop(index, None)) is not None:
            return self._echo(index, prompt, delta)
        if self._options.logprobs is None or delta.logprobs is None:
            return delta.text, [NULL]
        return delta.text, columns(self._name, (), delta.logprobs, self._options.logprobs, self._bases.get(index, 0))

    def _echo(self, index: int, prompt: Sequence[int], delta: Delta) -> tuple[str, list[bytes]]:
        """As `_parts`, with the prompt before it."""
        text, begins = decode(self._tokenizer, prompt, self._options.special)
        self._bases[index] = base = len(text)
        if self._options.logprobs is None:
            return text + delta.text, [NULL]
        before = zip(begins[1:], delta.prompt_logprobs or (), strict=True)
        after = ((base + begin, entry) for begin, entry in delta.logprobs or ())
        return text + delta.text, columns(self._name, prompt[:1], chain(before, after), self._options.logprobs)

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        self._begin(prompts)
        if not self._options.token_ids:
            return b""
        empty = self._content("") + b',"logprobs":null,"finish_reason":null,"token_ids":[]'
        return b"".join(self._frame(index, empty + self._prompt_ids(prompt)) for index, prompt in enumerate(prompts))

    def _whole_content(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFrames(Frames):
    """Encodes the responses of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    before_text, after_text = b'"delta":{"content":', b"}"
    prompt_beside_choices = True

    def _parts(self, index: int, delta: Delta) -> tuple[str, list[bytes]]:
        if self._options.logprobs is None or delta.logprobs is None:
            return delta.text, [NULL]
        return delta.text, objects(self._name, delta.logprobs)

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        beside = [self._prompt_ids(prompts[0]), *[b""] * (len(prompts) - 1)]
        frames = [self._frame(index, role, ids) for index, ids in enumerate(beside)]
        if self._options.said:
            said = self._content(self._options.said) + b',"logprobs":null,"finish_reason":null'
            frames += [self._frame(index, said) for index in range(len(prompts))]
        return b"".join(frames)

    def _content(self, text: str) -> bytes:
        return super()._content(text) if text else b'"delta":{}'

    def _content_with(self, text: str, members: Mapping[str, Any]) -> bytes:
        return b'"delta":' + orjson.dumps({"content": text, **members} if text else members)

    def _whole_content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": self._options.said + text, "refusal": None}}

    def _with_members(self, content: dict[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
        message = {**content["message"], **members}
        if "tool_calls" in members or message["refusal"]:
            message["content"] = message["content"] or None
        return {"message": message}
