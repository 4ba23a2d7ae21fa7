"""Work that would hold up the event loop goes to a thread: one piece of it at a time, tenants in turn.

A thread shares the interpreter's lock with the loop and the engine: several at once would leave less to those.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from bdh_batch.http.request.client import Client, unless_left
from bdh_batch.system.threads import DaemonThreads
from bdh_batch.text.job_queue import JobQueue, QueueLimits

T = TypeVar("T")

LARGE = 16384  # bytes of a body, or about as many microseconds of work: what is less is done at once
THREAD = "bdh-large-bodies"


class OffLoop:
    """Runs the long work of all requests, in a thread that does not keep the program from ending."""

    def __init__(self) -> None:
        self._queue = JobQueue(QueueLimits(at_once=1, most_waiting=sys.maxsize, most_bytes=sys.maxsize, seconds=None))
        self._thread = DaemonThreads(1, THREAD)

    def of(self, tenant: str, client: Client | None = None) -> Aside:
        return Aside(self, tenant, client)

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises. A task that is cancelled leaves the queue; work that has begun is finished."""
        await self._queue.take(tenant, 0)
        outcome = asyncio.wrap_future(self._thread.submit(work))
        outcome.add_done_callback(lambda _: self._queue.give_back(tenant))
        return await asyncio.shield(outcome)


@dataclass(frozen=True, slots=True)
class Aside:
    """Where a tenant's long work is done, for as long as its `client` waits; None is one that always does."""

    off_loop: OffLoop
    tenant: str
    client: Client | None = None

    def of_nobody(self) -> Aside:
        """For work that goes on when the client has left."""
        return Aside(self.off_loop, self.tenant)

    async def run(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` makes of `arguments`: at once where its `size` is small, else off the event loop.

        Raises:
            ClientDisconnect: the client has gone. Work that has not begun is dropped.
        """
        if size <= LARGE:
            return work(*arguments)
        working = self.off_loop.run(self.tenant, lambda: work(*arguments))
        return await (working if self.client is None else unless_left(self.client, working))
