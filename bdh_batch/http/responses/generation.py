"""Sends a generation to its client, as server-sent events or whole. A client that disconnects ends its generation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdh_batch.backends.base import DirectGeneration, Generation
from bdh_batch.errors import BDHError
from bdh_batch.http.request.client import Client, left
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses.chunks import Chunks, Deltas
from bdh_batch.http.responses.frames import Frames
from bdh_batch.http.responses.json_pieces import JsonInPieces, send_pieces
from bdh_batch.http.transport.exchange import EXCHANGE
from bdh_batch.messages import Delta, FinishReason, Gathering, Usage

BRIEF = 100  # microseconds, about, of encoding that is done for a stream where many others have their turn behind it
CHOICE_COST = 10  # microseconds, about, to encode one
CHARACTERS = 16  # that are encoded, or read for calls, in a microsecond
Drawn = Callable[[Sequence[int]], None]
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back until it has a page of them
]


class DirectWriter(Protocol):
    """Writes a response's body without waiting: an `Exchange`."""

    @property
    def takes_parts(self) -> bool:
        """Whether it writes at once. Else what is said has to be sent, which waits for the client."""

    def write_part(self, body: bytes) -> None:
        """Writes a part of the body; there is more to come."""


class EventStream(Response):
    """An ASGI response that writes a generation's frames as its tokens come, all that are ready in one write.

    A task sends the first ones. From then on, frames are written in the callback of the event loop that brings their
    tokens, and the task is woken where the connection is behind, and at the end.

    It starts with the first token, or after `keepalive` seconds of silence (0 is never): what ends before that has the
    status of its error. After every further silence of that length it sends the frames' `keepalive`.

    Args:
        aside: where frames are encoded that take long, as those of an echoed prompt.
        drawn: is called with the tokens of the first choice, once all have ended well.
    """

    def __init__(
        self,
        generation: Generation,
        frames: Frames,
        aside: Aside,
        chunk_tokens: int = 1,
        keepalive: float = 0,
        drawn: Drawn | None = None,
    ) -> None:
        super().__init__()
        self._aside = aside
        self._generation = generation
        self._frames = frames
        self._together = Chunks(chunk_tokens)
        self._keepalive = keepalive
        self._drawn = drawn
        self._started = False
        self._completion_tokens = 0
        self._direct: DirectWriter | None = None
        self._first: list[int] = []  # tokens of the first choice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._direct = scope.get(EXCHANGE)
        async with abort_when_left(self._generation, lambda: left(receive)), self._kept_alive(send):
            opening, failed = True, None
            async for deltas in self._generation:
                failed = failure_of(deltas)
                if failed is not None:
                    failed = self._frames.named(failed)
                    if not self._started:
                        raise failed
                await self._write(send, await self._encoded(deltas, opening))
                if failed is not None:
                    break
                self._count_first(deltas)
                if opening and self._direct is not None and isinstance(self._generation, DirectGeneration):
                    self._generation.offer_to(self._take)
                opening = False
            if failed is None:
                if self._drawn is not None:
                    self._drawn(self._first)
                await self._frames.before_end(self._usage())
            last = self._frames.closing(self._usage()) if failed is None else self._frames.failed(failed)
            await send({"type": "http.response.body", "body": last, "more_body": False})

    def _take(self, deltas: Deltas) -> bool:
        """Writes the frames of deltas as they come, without the task that runs this response. It is left to that where
        the client reads slowly, or encoding takes long."""
        writer = self._direct
        if writer is None or not writer.takes_parts or self._cost((), deltas) > BRIEF:
            return False
        body = b"".join(self._frames.with_warnings(self._body(deltas)))
        if body:  # an empty chunk would end the response
            self._last = time.monotonic()
            writer.write_part(body)
        if self._drawn is not None:
            self._count_first(deltas)
        return True

    def _count_first(self, deltas: Deltas) -> None:
        """Keeps the tokens of the first choice, if anyone asks for them."""
        for index, delta in deltas if self._drawn is not None else ():
            if index == 0:
                self._first += delta.tokens

    async def _write(self, send: Send, pieces: Iterable[bytes]) -> None:
        self._last = time.monotonic()
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send_pieces(send, pieces)

    async def _encoded(self, deltas: Deltas, opening: bool) -> list[bytes]:
        if not opening:
            pieces = await self._aside.run(self._cost((), deltas), self._body, deltas)
        else:
            prompts = self._generation.prompts
            pieces = await self._aside.run(self._cost(prompts, deltas), self._first_pieces, prompts, deltas)
        return self._frames.with_warnings(pieces)

    def _cost(self, prompts: Sequence[Sequence[int]], deltas: Deltas) -> int:
        if self._frames.only_text:  # the most frequent case, and cheap
            return 0
        return self._frames.cost(prompts, [delta for _, delta in deltas])

    @asynccontextmanager
    async def _kept_alive(self, send: Send) -> AsyncIterator[None]:
        """Sends the frames' `keepalive` after every `keepalive` seconds in which nothing else was sent."""
        self._last = time.monotonic()

        async def beat() -> None:
            while True:
                await asyncio.sleep(max(0.0, self._last + self._keepalive - time.monotonic()))
                if time.monotonic() - self._last >= self._keepalive:
                    await self._write(send, [self._frames.keepalive])

        beating = asyncio.create_task(beat()) if self._keepalive else None
        try:
            yield
        finally:
            if beating is not None:
                beating.cancel()

    def _first_pieces(self, prompts: Sequence[Sequence[int]], first: Deltas) -> list[bytes]:
        if self._frames.continuous_usage:
            self._frames.report_usage(self._usage())
        return [self._frames.opening(prompts), *self._body(first)]

    def _body(self, arrived: Deltas) -> list[bytes]:
        """The frames of all that may go now, in pieces."""
        frames = self._frames
        if frames.continuous_usage:
            return self._with_usage(self._together.take(arrived))
        pieces: list[bytes] = []
        for index, delta in self._together.take(arrived):
            if delta.error is None:
                self._completion_tokens += len(delta.tokens)
                pieces += frames.delta(index, delta)
        return pieces

    def _with_usage(self, deltas: Deltas) -> list[bytes]:
        known = self._usage()
        frames: list[bytes] = []
        for index, delta in deltas:
            if delta.error is not None:
                continue
            self._completion_tokens += len(delta.tokens)
            so_far = self._completion_tokens + (known.reasoning_tokens or 0)
            self._frames.report_usage(replace(known, completion_tokens=so_far))
            frames += self._frames.delta(index, delta)
        return frames

    def _usage(self) -> Usage:
        return self._generation.usage(self._completion_tokens)


async def whole(
    generation: Generation, frames: Frames, client: Client, aside: Aside, drawn: Drawn | None = None
) -> Response:
    """The response as one JSON object.

    Args:
        aside: where one is encoded that takes long.
        drawn: is called with the tokens of the first choice.

    Raises:
        BDHError: the one that a sequence ended with.
        ClientDisconnect
    """
    ends = await collect(generation, client)
    if drawn is not None:
        drawn(frames.first(ends).tokens)
    prompts = generation.prompts
    cost = frames.cost(prompts, ends) + sum([CHOICE_COST + len(end.text) // CHARACTERS for end in ends])
    usage = generation.usage(sum(len(end.tokens) for end in ends))
    await frames.before_end(usage, ends)
    return JsonInPieces(await aside.run(cost, frames.whole, prompts, usage, ends))


async def collect(generation: Generation, client: Client) -> list[Delta]:
    """All that each sequence gained. Raises as `whole` does."""
    ends = [Gathering() for _ in generation.prompts]
    async with abort_when_left(generation, client.leaves):
        async for deltas in generation:
            if (failed := failure_of(deltas)) is not None:
                raise failed
            for index, delta in deltas:
                ends[index].add(delta)
    whole = [end.whole() for end in ends]
    if any(end.finish_reason is FinishReason.ABORT for end in whole):
        raise ClientDisconnect
    return whole


@asynccontextmanager
async def abort_when_left(generation: Generation, leaves: Callable[[], Awaitable[None]] | None) -> AsyncIterator[None]:
    """Aborts `generation` as soon as its client `leaves`, and in any case on the way out."""

    async def watch() -> None:
        assert leaves is not None
        await leaves()
        generation.abort()

    watcher = None if leaves is None else asyncio.create_task(watch())
    try:
        yield
    finally:
        if watcher is not None:
            watcher.cancel()
        generation.abort()


def failure_of(deltas: Deltas) -> BDHError | None:
    """The error of the first sequence in `deltas` that failed, or None."""
    for _, delta in deltas:
        if delta.error is not None:
            return delta.error
    return None
