"""Responses in the background: they go on whether or not their clients wait, and their events can be read meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack

from starlette.responses import StreamingResponse

from bdh_batch.backends.base import Generation
from bdh_batch.errors import BDHError, GenerationFailed, QueueFull
from bdh_batch.http.responses.generation import failure_of
from bdh_batch.http.responses_api.frames import ResponseFrames

log = logging.getLogger(__name__)

MOST_ENDED = 64  # whose events can still be read
CANCELLED = "cancelled"
Put = Callable[[ResponseFrames], Awaitable[bool]]


class Run:
    """One response in the background.

    Args:
        put: stores the response as it is.
        cleanup: is closed when it has ended.
    """

    def __init__(
        self, owner: str, generation: Generation, frames: ResponseFrames, put: Put, cleanup: ExitStack
    ) -> None:
        self.owner = owner
        self.frames = frames
        self.events = [frames.queued()]
        self.ended = False
        self._generation = generation
        self._put = put
        self._cleanup = cleanup
        self._changed = asyncio.Event()
        self._cancelled = False

    async def run(self) -> None:
        with self._cleanup:
            try:
                await self._generate()
            except BDHError as error:
                await self._fail(error)
            except Exception:  # the task is nobody's: what it ended with has to be told here
                log.exception("response %s failed", self.frames.response["id"])
                await self._fail(GenerationFailed("Internal server error."))
            finally:
                self._generation.abort()
                self.ended = True
                self._tell()

    def cancel(self) -> None:
        """Ends it. Idempotent."""
        self._cancelled = True
        self._generation.abort()

    async def wait(self) -> None:
        """Returns once it has ended."""
        while not self.ended:
            await self._changed.wait()

    async def read(self, after: int) -> AsyncIterator[bytes]:
        """The events behind number `after`, those that are still to come included."""
        at = 0
        while True:
            changed, number = self._changed, len(self.events)
            for group in self.events[at:number]:
                for event in group.split(b"\n\n")[:-1]:
                    if _number(event) > after:
                        yield event + b"\n\n"
            at = number
            if self.ended and at == len(self.events):
                return
            if at == len(self.events):
                await changed.wait()

    async def _generate(self) -> None:
        begun, tokens = False, 0
        async for deltas in self._generation:
            if (error := failure_of(deltas)) is not None and not self._cancelled:
                raise self.frames.named(error)
            if not begun:
                begun = True
                self._add(self.frames.begun())
                await self._put(self.frames)
            tokens += sum(len(delta.tokens) for _, delta in deltas)
            self._add(b"".join(piece for index, delta in deltas for piece in self.frames.delta(index, delta)))
        if self._cancelled:
            self.frames.cancel()
            await self._put(self.frames)
            return
        usage = self._generation.usage(tokens)
        await self.frames.before_end(usage)
        self._add(self.frames.closing(usage))

    async def _fail(self, error: BDHError) -> None:
        self._add(self.frames.failed(error))
        await self._put(self.frames)

    def _add(self, events: bytes) -> None:
        if events:
            self.events.append(events)
            self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Background:
    """The responses in the background of this process: so many at a time, of which one caller may have half."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running: dict[str, Run] = {}
        self._ended: OrderedDict[str, Run] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self, owner: str) -> None:
        """Raises QueueFull: there is no room for one more."""
        own = sum(run.owner == owner for run in self._running.values())
        if len(self._running) >= self._most or own >= max(1, self._most // 2):
            text = f"Too many responses are in the background (limits.max_background is {self._most}; half for one)."
            raise QueueFull(text, 5)

    def start(self, run: Run) -> None:
        id = run.frames.response["id"]
        self._running[id] = run
        task = asyncio.create_task(run.run())
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._end(id, task))

    def find(self, id: str, owner: str) -> Run | None:
        """One that runs here, or has ended a short while ago."""
        run = self._running.get(id) or self._ended.get(id)
        return run if run is not None and run.owner == owner else None

    def forget(self, id: str) -> None:
        self._ended.pop(id, None)

    async def close(self) -> None:
        """Returns once all have ended. Idempotent."""
        for run in self._running.values():
            run.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end(self, id: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._ended[id] = self._running.pop(id)
        while len(self._ended) > MOST_ENDED:
            self._ended.popitem(last=False)


def stream_of(run: Run, after: int = -1) -> StreamingResponse:
    """The events of a run behind number `after`; a client that leaves ends nothing."""
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(run.read(after), headers=headers, media_type="text/event-stream")


def _number(event: bytes) -> int:
    """The sequence number of an event that `ResponseFrames` has made."""
    return int(event.partition(b'"sequence_number":')[2].split(b",", 1)[0])
