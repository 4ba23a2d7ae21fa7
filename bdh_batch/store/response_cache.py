"""Responses to requests that determine them, kept for the next request that is the same.

What is kept are the deltas of a generation, so a response can be replayed as a stream or whole, over any protocol. Only
one that has ended well is kept: none with an error, none that was cut off, and none whose client has left.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from bdh_batch.backends.base import Ended, Generation
from bdh_batch.backends.generation import Tally
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Neurons, TokenLogprob, Usage
from bdh_batch.store.byte_cache import ByteCache, Unreachable

log = logging.getLogger(__name__)

FORMAT = 4  # of entries: another one is another key
CUT_OFF = (FinishReason.ABORT, FinishReason.ERROR)
TOKEN_BYTES = 9  # of one in an entry, at most
SLICE = 32  # steps that are replayed at a time

Counted = Callable[[str], None]  # "hit", "miss", "kept" or "failed"


class Piece(msgspec.Struct, array_like=True):
    """A delta of one sequence."""

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None
    logprob: float
    logprobs: list[tuple[int, TokenLogprob]] | None
    prompt_logprobs: list[TokenLogprob] | None
    extras: list[dict[str, Any]] | None
    stop: str | None
    neurons: list[Neurons] | None

    @classmethod
    def of(cls, index: int, delta: Delta) -> Piece:
        reason, prompt, extras = delta.finish_reason, delta.prompt_logprobs, delta.extras
        return cls(
            *(index, delta.text, [*delta.tokens], None if reason is None else reason.value, delta.logprob),
            None if delta.logprobs is None else [*delta.logprobs],
            None if prompt is None else [*prompt],
            None if extras is None else [dict(extra) for extra in extras],
            delta.stop,
            delta.neurons,
        )

    @property
    def delta(self) -> Delta:
        reason = None if self.finish_reason is None else FinishReason(self.finish_reason)
        return Delta(
            self.text,
            self.tokens,
            reason,
            logprobs=self.logprobs,
            logprob=self.logprob,
            prompt_logprobs=self.prompt_logprobs,
            extras=None if self.extras is None else [*self.extras],
            stop=self.stop,
            neurons=self.neurons,
        )


DECODER = msgspec.msgpack.Decoder(list[Piece])


class Entry(msgspec.Struct, array_like=True):
    """A generation that has ended: what each of its steps brought, encoded one by one, and how many tokens in all.

    So no more than a step is encoded or decoded at a time, and what an entry takes is known while it grows.
    """

    steps: list[bytes]
    tokens: int
    cached_tokens: list[int]
    usage: Usage


class ResponseCache:
    """Finds and keeps responses.

    Args:
        most_bytes: of one response; a larger one is not kept.
    """

    def __init__(self, cache: ByteCache, most_bytes: int) -> None:
        self._cache = cache
        self._most_bytes = most_bytes
        self._decoder = msgspec.msgpack.Decoder(Entry)

    @property
    def held(self) -> int:
        """Bytes of this process's memory that it takes."""
        return self._cache.held

    async def find(self, key: str, request: GenerationRequest, counted: Counted) -> Generation | None:
        """Returns the generation of an earlier request of that key, as one of `request`; None where there is none."""
        try:
            found = await self._cache.get(key)
            entry = None if found is None else self._decoder.decode(found)
        except (Unreachable, msgspec.MsgspecError) as error:
            log.warning("the response cache cannot be read: %s", error)
            counted("failed")
            return None
        counted("miss" if entry is None else "hit")
        return None if entry is None else Replayed(request, entry)

    def recorded(self, key: str, generation: Generation, counted: Counted) -> Generation:
        """Returns the same generation, which is kept when it has ended well and was read to its end."""
        return Recorded(generation, lambda entry: self._keep(key, entry, counted), self._most_bytes)

    async def close(self) -> None:
        """Closes connections. Idempotent."""
        await self._cache.close()

    async def _keep(self, key: str, entry: Entry, counted: Counted) -> None:
        value = msgspec.msgpack.encode(entry)
        if len(value) > self._most_bytes:
            return
        try:
            await self._cache.put(key, value)
        except Unreachable as error:
            log.warning("the response cache cannot be written: %s", error)
            counted("failed")
        else:
            counted("kept")


class Recorded:
    """A generation whose deltas are kept once all are there, unless they take more than `most_bytes`."""

    def __init__(self, generation: Generation, keep: Callable[[Entry], Any], most_bytes: int) -> None:
        self._generation = generation
        self._keep = keep
        self._left = most_bytes
        self._steps: list[bytes] | None = []

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        return self._generation.prompts

    @property
    def cached_tokens(self) -> Sequence[int]:
        return self._generation.cached_tokens

    def usage(self, completion_tokens: int) -> Usage:
        return self._generation.usage(completion_tokens)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        tokens = 0
        async for deltas in self._generation:
            tokens += sum([len(delta.tokens) for _, delta in deltas])
            self._record(deltas)
            yield deltas
        if self._steps:
            steps, self._steps = self._steps, None
            await self._keep(Entry(steps, tokens, [*self.cached_tokens], self.usage(tokens)))

    def abort(self) -> None:
        self._steps = None
        self._generation.abort()

    def on_end(self, ended: Ended) -> None:
        self._generation.on_end(ended)

    def _record(self, deltas: Sequence[tuple[int, Delta]]) -> None:
        if self._steps is None:
            return
        if any(delta.finish_reason in CUT_OFF or _least_bytes(delta) > self._left for _, delta in deltas):
            self._steps = None
            return
        pieces = [Piece.of(index, delta) for index, delta in deltas]
        step = msgspec.msgpack.encode(pieces, enc_hook=list)  # the likeliest tokens are a sequence of their own kind
        self._left -= len(step)
        if self._left < 0:
            self._steps = None
        else:
            self._steps.append(step)


def _least_bytes(delta: Delta) -> int:
    """Returns about how many bytes a delta takes in an entry, without encoding it."""
    given = [each for _, each in delta.logprobs or ()] + [*(delta.prompt_logprobs or ())]
    likeliest = sum([1 + len(each.top) for each in given])
    shown = sum([sum(map(len, each[2:])) for each in delta.neurons or ()])
    return len(delta.text) + TOKEN_BYTES * likeliest + shown


class Replayed:
    """The generation of an earlier request, once more."""

    def __init__(self, request: GenerationRequest, entry: Entry) -> None:
        self._request = request
        self._entry = entry
        self._tally = Tally(len(request.prompts) * request.n)

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        return [prompt.tokens for prompt in self._request.prompts for _ in range(self._request.n)]

    @property
    def cached_tokens(self) -> Sequence[int]:
        return self._entry.cached_tokens

    def usage(self, completion_tokens: int) -> Usage:
        of = self._entry.usage
        ended, so_far = completion_tokens >= self._entry.tokens, completion_tokens + (of.reasoning_tokens or 0)
        return replace(of, completion_tokens=of.completion_tokens if ended else so_far)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        for number, step in enumerate(self._entry.steps, 1):
            if number % SLICE == 0:  # all are there, and nothing else would make others wait
                await asyncio.sleep(0)
            deltas = [(piece.index, piece.delta) for piece in DECODER.decode(step)]
            self._tally.add(deltas)
            yield deltas

    def abort(self) -> None:
        self._tally.end()

    def on_end(self, ended: Ended) -> None:
        self._tally.on_end(ended)


def key_of(tenant: str, revision: str, kind: str, fields: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """Returns the key of a request.

    Args:
        tenant: whose it is: nobody gets what others have asked.
        revision: of the model: its files and its settings.
        kind: of the request's body.
        fields: of the body that decide on the response. Only their own order makes no difference: the properties of a
            schema, and of a tool, come in theirs.
        headers: that are passed on to an upstream.
    """
    parts = [FORMAT, tenant, revision, kind, sorted(fields.items()), sorted(headers.items())]
    text = json.dumps(parts)
    return hashlib.blake2b(text.encode(), digest_size=24).hexdigest()
