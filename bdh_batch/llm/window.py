"""How many sequences of one model are under way or wait at a time: lists of any length are submitted bit by bit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from bdh_batch.errors import QueueFull, TooLate
from bdh_batch.settings import Scheduler

T = TypeVar("T")

SOON_SECONDS = 0.05
MOST_ALONE = 8  # tries while nothing else is under way


@dataclass(frozen=True, slots=True)
class Job(Generic[T]):
    """Work of so many sequences."""

    sequences: int
    work: Callable[[], Awaitable[T]]


class Window:
    """Admits work of up to `most` sequences at a time, first come, first served. Belongs to one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self, sequences: int) -> None:
        async with self._turn:
            while self.used and self.used + sequences > self.most:
                self._freed.clear()
                await self._freed.wait()
            self.used += sequences

    def give_back(self, sequences: int) -> None:
        self.used -= sequences
        self._freed.set()

    def _ended(self, sequences: int, task: asyncio.Task[None]) -> None:
        self.give_back(sequences)

    async def admitted(self, sequences: int, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` returns, which has room. Where the engine's own queue is full, of prompts that are long, it is
        tried again when something else has ended."""
        alone = 0
        while True:
            try:
                return await work()
            except QueueFull as refused:
                if self.used > sequences:
                    wait = float(refused.retry_after)
                else:  # the engine may not have heard yet of what has ended
                    wait, alone = SOON_SECONDS, alone + 1
                if isinstance(refused, TooLate) or alone > MOST_ALONE:
                    raise
            await self._something_ends(wait)

    async def _something_ends(self, seconds: float) -> None:
        """Waits until something under way has ended, so long at most."""
        self._freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._freed.wait()

    async def all(self, jobs: Iterable[Job[T]], done: Callable[[T], None]) -> list[T]:
        """What each job returns, in their order; jobs are taken from the iterable when there is room for them.

        The first that fails ends the others, and its error is raised.

        Args:
            done: is called with each result, as they come.
        """
        results: dict[int, T] = {}

        async def run(index: int, job: Job[T]) -> None:
            results[index] = await self.admitted(job.sequences, job.work)
            done(results[index])

        try:
            async with asyncio.TaskGroup() as group:
                for index, job in enumerate(jobs):
                    await self.take(job.sequences)
                    running = group.create_task(run(index, job))
                    # Also where it is cancelled before it has begun.
                    running.add_done_callback(partial(self._ended, job.sequences))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [results[index] for index in range(len(results))]


def window_for(scheduler: Scheduler) -> Window:
    """A window for one model: as many as run, and as many again that wait, so that nobody waits for the next one."""
    return Window(scheduler.max_running + min(scheduler.max_running, scheduler.max_queued_requests))
