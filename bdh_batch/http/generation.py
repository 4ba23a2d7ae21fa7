"""From a generation to its client: as server-sent events, or whole. A client that leaves ends its generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdh_batch.backends.base import Generation
from bdh_batch.errors import BDHError
from bdh_batch.http.frames import Frames, error_frame
from bdh_batch.messages import Delta, FinishReason

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class EventStream(Response):
    """An ASGI response that writes a generation's frames as its tokens come, all that are ready in one write."""

    def __init__(self, generation: Generation, frames: Frames) -> None:
        super().__init__()
        self._generation = generation
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with abort_when_left(self._generation, receive):
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            async for body in self._chunks():
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        prompts = self._generation.prompts
        if opening := self._frames.opening(prompts):
            yield opening
        completion_tokens = 0
        async for deltas in self._generation:
            completion_tokens += sum(len(delta.tokens) for _, delta in deltas)
            good = [(index, delta) for index, delta in deltas if delta.error is None]
            if body := b"".join(self._frames.delta(index, delta) for index, delta in good):
                yield body
            if (failed := _failure(deltas)) is not None:
                yield error_frame(failed)
                return
        yield self._frames.closing(self._frames.usage(prompts, self._generation.cached_tokens, completion_tokens))


async def whole(generation: Generation, frames: Frames, request: Request) -> Response:
    """The answer in one piece.

    Raises:
        BDHError: the one that a sequence ended with.
        ClientDisconnect
    """
    ends = await collect(generation, request)
    return Response(frames.whole(generation.prompts, generation.cached_tokens, ends), media_type="application/json")


async def collect(generation: Generation, request: Request) -> list[Delta]:
    """All that each sequence gained. Raises as `whole` does."""
    ends = [Delta() for _ in generation.prompts]
    async with abort_when_left(generation, request.receive):
        async for deltas in generation:
            if (failed := _failure(deltas)) is not None:
                raise failed
            for index, delta in deltas:
                ends[index].absorb(delta)
    if any(end.finish_reason is FinishReason.ABORT for end in ends):
        raise ClientDisconnect
    return ends


@asynccontextmanager
async def abort_when_left(generation: Generation, receive: Receive) -> AsyncIterator[None]:
    """Aborts `generation` as soon as its client has gone, and in any case on the way out."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        generation.abort()


def _failure(deltas: list[tuple[int, Delta]]) -> BDHError | None:
    return next((delta.error for _, delta in deltas if delta.error is not None), None)
