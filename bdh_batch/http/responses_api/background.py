"""Responses in the background: they go on whether or not their clients wait, and their events can be read meanwhile.

One runs in the process that it came to. Others that share the store find its record there, which says which process
that is; they have it cancelled by leaving a word in the store, for which its process looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from itertools import accumulate
from typing import Protocol

from starlette.responses import StreamingResponse

from bdh_batch.backends.base import Generation
from bdh_batch.errors import BDHError, GenerationFailed, InvalidRequest, QueueFull, StoreFailed, Unavailable
from bdh_batch.http.responses.chunks import Chunks
from bdh_batch.http.responses.frames import COMMENT, DONE
from bdh_batch.http.responses.generation import failure_of
from bdh_batch.http.responses_api.frames import ResponseFrames, problem_event
from bdh_batch.store.record import Record, Records

log = logging.getLogger(__name__)

MOST_ENDED = 64  # whose events can still be read
SENT = 2**16  # bytes of events that are sent at once
STOP = "stop"  # the kind of a record that asks for the end of the response of its id
STOP_SECONDS = 60.0  # that one is kept
LOOK_SECONDS = 0.5  # between two looks for them
Put = Callable[[ResponseFrames], Awaitable[bool]]


class EventLog:
    """The newest events of one response, to be read while more come.

    Args:
        most: bytes. Where there are more, the earliest go; the last ones stay.
    """

    def __init__(self, most: int) -> None:
        self.ended = False
        self._most = most
        self._size = 0
        self._groups: list[bytes] = []
        self._first: list[int] = []  # the number of each group's first event
        self._next = 0
        self._changed = asyncio.Event()

    @property
    def earliest(self) -> int:
        """The number of the earliest event that can be read."""
        return self._first[0] if self._first else self._next

    def add(self, events: bytes, number: int) -> None:
        """Adds those up to `number`, which the next one will have."""
        if not events:
            return
        self._first.append(self._next)
        self._groups.append(events)
        self._next = number
        self._size += len(events)
        if self._size > self._most:
            self._drop()
        self._tell()

    def end(self) -> None:
        self.ended = True
        self._tell()

    async def wait(self) -> None:
        """Returns once it has ended."""
        while not self.ended:
            await self._changed.wait()

    async def read(self, after: int, keepalive: float = 0) -> AsyncIterator[bytes]:
        """The events behind number `after`, those that are still to come included, and [DONE]. A reader for whom they
        go too fast gets an error before that.

        Args:
            keepalive: seconds after which silence is broken; 0 is never.
        """
        wanted = after + 1
        while True:
            changed, ended = self._changed, self.ended
            if wanted < self.earliest:
                yield problem_event(wanted, gone(wanted, self.earliest)) + DONE
                return
            if wanted < self._next:
                found, wanted = self._from(wanted)
                yield found
                await asyncio.sleep(0)  # a client that takes all at once does not keep the others waiting
            elif ended:
                yield DONE
                return
            else:
                try:
                    await asyncio.wait_for(changed.wait(), keepalive or None)
                except TimeoutError:
                    yield COMMENT

    def _from(self, wanted: int) -> tuple[bytes, int]:
        """Events from number `wanted` on, about SENT bytes, and the number of the one behind them."""
        at = bisect_right(self._first, wanted) - 1
        within = self._groups[at].split(b"\n\n")[wanted - self._first[at] : -1]
        pieces, size, at = [b"".join(event + b"\n\n" for event in within)], 0, at + 1
        while at < len(self._groups) and (size := size + len(self._groups[at])) <= SENT:
            pieces.append(self._groups[at])
            at += 1
        return b"".join(pieces), self._first[at] if at < len(self._first) else self._next

    def _drop(self) -> None:
        """Drops the earlier half, so that it is seldom done."""
        gone, least = 0, self._size - self._most // 2
        for size in accumulate(map(len, self._groups[:-1])):
            gone += 1
            if size >= least:
                break
        self._size -= sum(map(len, self._groups[:gone]))
        del self._groups[:gone], self._first[:gone]

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Run:
    """One response in the background.

    Args:
        put: stores the response as it is under way, and when it has failed.
        log: of its events.
        cleanup: is closed when it has ended.
    """

    def __init__(
        self,
        owner: str,
        generation: Generation,
        frames: ResponseFrames,
        put: Put,
        log: EventLog,
        chunk_tokens: int,
        cleanup: ExitStack,
    ) -> None:
        self.owner = owner
        self.response = frames.response
        self.log = log
        self._generation = generation
        self._frames: ResponseFrames | None = frames
        self._put = put
        self._chunks = Chunks(chunk_tokens)
        self._cleanup = cleanup
        self._cancelled = False
        self._shut_down = False
        self._reading: asyncio.Future[int] | None = None

    async def run(self) -> None:
        frames, self._frames = self._frames, None  # what has been generated is held no longer than it runs
        assert frames is not None
        with self._cleanup:
            try:
                await self._generate(frames)
            except BDHError as error:
                await self._fail(frames, error)
            except Exception:  # the task is nobody's: what it ended with has to be told here
                id = self.response["id"]
                log.exception("response %s failed", id, extra={"fields": {"response_id": id}})
                await self._fail(frames, GenerationFailed("Internal server error."))
            finally:
                self._generation.abort()
                self.log.end()

    def cancel(self) -> None:
        """Ends it for its client. Idempotent."""
        self._cancelled = True
        self._stop()

    def shut_down(self) -> None:
        """Ends it with the server. Idempotent."""
        self._shut_down = True
        self._stop()

    def _stop(self) -> None:
        self._generation.abort()
        if self._reading is not None:  # of what was aborted nothing need come any more
            self._reading.cancel()

    async def _generate(self, frames: ResponseFrames) -> None:
        tokens = 0
        if not (self._cancelled or self._shut_down):
            self._reading = asyncio.ensure_future(self._read(frames))
            await asyncio.wait((self._reading,))
            if not self._reading.cancelled():
                tokens = self._reading.result()
        if self._cancelled:
            frames.cancel()
            await self._put(frames)
            return
        if self._shut_down:
            raise Unavailable("The server is shutting down.", 5)
        usage = self._generation.usage(tokens)
        await frames.before_end(usage)
        self._add(frames, frames.ending)
        if not self.response["store"]:  # who asks for it later has to know that it is over
            frames.fail(StoreFailed("The response could not be stored."))
            await self._put(frames)

    async def _read(self, frames: ResponseFrames) -> int:
        """Adds events until its sequence has ended. Returns the number of tokens."""
        begun, tokens = False, 0
        async for deltas in self._generation:
            if (error := failure_of(deltas)) is not None and not self._cancelled:
                raise frames.named(error)
            if not begun:
                begun = True
                self._add(frames, await frames.begin())
                await self._put(frames)
            tokens += sum(len(delta.tokens) for _, delta in deltas)
            ready = self._chunks.take(deltas)
            self._add(frames, b"".join(piece for index, delta in ready for piece in frames.delta(index, delta)))
        return tokens

    async def _fail(self, frames: ResponseFrames, error: BDHError) -> None:
        self._add(frames, frames.failure(error))
        await self._put(frames)

    def _add(self, frames: ResponseFrames, events: bytes) -> None:
        self.log.add(events, frames.number)


class Background:
    """The responses in the background of this process: so many at a time, of which one caller may have half."""

    def __init__(self, most: int, records: Records) -> None:
        self._most = most
        self._records = records
        self._reserved: Counter[str] = Counter()
        self._running: dict[str, Run] = {}
        self._ended: OrderedDict[str, Run] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None

    def reserve(self, owner: str, until: ExitStack) -> None:
        """Takes room for one more, until the end of its request. Raises QueueFull."""
        if self._reserved.total() >= self._most or self._reserved[owner] >= max(1, self._most // 2):
            text = f"Too many responses are in the background (limits.max_background is {self._most}; half for one)."
            raise QueueFull(text, 5)
        self._reserved[owner] += 1
        until.callback(self._give_back, owner)

    def start(self, run: Run) -> None:
        """Starts one for which there is room."""
        id = run.response["id"]
        self._running[id] = run
        task = asyncio.create_task(run.run())
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._end(id, task))
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

    def find(self, id: str, owner: str) -> Run | None:
        """One that runs here, or has ended a short while ago."""
        run = self._running.get(id) or self._ended.get(id)
        return run if run is not None and run.owner == owner else None

    def log(self, owner: str, id: str) -> EventLog | None:
        """The events of one that runs here, or has ended a short while ago."""
        run = self.find(id, owner)
        return None if run is None else run.log

    async def stop_elsewhere(self, id: str, owner: str) -> None:
        """Asks the process that runs it, another one, to cancel it. Raises StoreFailed."""
        now = time.time()
        await self._records.put(Record(id, STOP, owner, now, now + STOP_SECONDS))

    def forget(self, id: str) -> None:
        self._ended.pop(id, None)

    async def close(self) -> None:
        """Returns once all have ended. Idempotent."""
        for run in self._running.values():
            run.shut_down()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        """Looks for those that are to be cancelled, as long as there are any."""
        while self._running:
            await asyncio.sleep(LOOK_SECONDS)
            for id, run in [*self._running.items()]:
                with contextlib.suppress(StoreFailed):  # which was counted; there is a next time
                    if await self._records.get(STOP, id, run.owner) is not None:
                        run.cancel()
                        await self._records.delete(STOP, id, run.owner)

    def _give_back(self, owner: str) -> None:
        self._reserved[owner] -= 1
        if not self._reserved[owner]:
            del self._reserved[owner]

    def _end(self, id: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._ended[id] = self._running.pop(id)
        while len(self._ended) > MOST_ENDED:
            self._ended.popitem(last=False)


class Events(Protocol):
    """The events of one response: an `EventLog`, or that of another process."""

    @property
    def earliest(self) -> int:
        """The number of the earliest event that can be read."""

    def read(self, after: int, keepalive: float = 0) -> AsyncIterator[bytes]:
        """See `EventLog.read`."""


def stream_of(events: Events, keepalive: float, after: int = -1) -> StreamingResponse:
    """The events behind number `after`; a client that leaves ends nothing.

    Raises:
        InvalidRequest: they are not kept any more.
    """
    if after + 1 < events.earliest:
        raise gone(after + 1, events.earliest)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events.read(after, keepalive), headers=headers, media_type="text/event-stream")


def gone(number: int, earliest: int) -> InvalidRequest:
    """The error for who wants an event that is not kept any more."""
    text = f"Event {number} is not kept any more (limits.max_background_bytes): the first one is {earliest}."
    return InvalidRequest(text, "starting_after")
