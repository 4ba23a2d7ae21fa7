"""A bounded queue of jobs that is fair to tenants. Of a job it knows the tenant and the size."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

from bdh_batch.errors import QueueFull

RETRY_SECONDS = 5


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The limits of a queue of jobs.

    Args:
        at_once: jobs that run at the same time. A tenant has at most one less, so that no other waits for it alone.
        most_waiting, most_bytes: jobs that wait, and what they hold, of all tenants together.
        seconds: that a job may wait; None is no limit.
    """

    at_once: int = 2
    most_waiting: int = 2048
    most_bytes: int = 64 * 2**20
    seconds: float | None = 10.0


@dataclass(eq=False, slots=True)
class _Waiting:
    started: asyncio.Future[None]
    size: int


class JobQueue:
    """A queue of jobs that starts one of each tenant in turn, each tenant's in their order.

    A full queue refuses the tenants that fill it: a tenant with far fewer waiting jobs evicts the newest job of the
    tenant that has most.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._share = max(1, limits.at_once - 1)
        self._queues: OrderedDict[str, deque[_Waiting]] = OrderedDict()  # of tenants with waiting jobs, next one first
        self._running: Counter[str] = Counter()
        self._bytes = 0
        self.waiting = 0

    @property
    def running(self) -> int:
        return self._running.total()

    async def take(self, tenant: str, size: int) -> None:
        """Waits until a job of `tenant` may start; `give_back` ends it.

        Raises:
            QueueFull: too many wait, or this one has waited for too long.
        """
        self._make_room(tenant, size)
        mine = _Waiting(asyncio.get_running_loop().create_future(), size)
        self._queues.setdefault(tenant, deque()).append(mine)
        self.waiting += 1
        self._bytes += size
        self._start_next()
        try:
            async with asyncio.timeout(self._limits.seconds):
                await mine.started
        except TimeoutError:
            self._leave(tenant, mine)
            text = f"It waited for {self._limits.seconds or 0:g} s (sandbox.queue_seconds), and other jobs go first."
            raise QueueFull(text, RETRY_SECONDS) from None
        except BaseException:
            self._leave(tenant, mine)
            raise

    def give_back(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._start_next()

    def _make_room(self, tenant: str, size: int) -> None:
        limits = self._limits
        while self.waiting >= limits.most_waiting or (self.waiting and self._bytes + size > limits.most_bytes):
            mine = len(self._queues.get(tenant, ()))
            longest = max(self._queues, key=lambda each: len(self._queues[each]))
            if len(self._queues[longest]) <= mine + 1:
                raise _full()
            newest = self._queues[longest][-1]
            self._remove(longest, newest)
            if not newest.started.done():
                newest.started.set_exception(_full())

    def _start_next(self) -> None:
        while self.running < self._limits.at_once:
            tenant = next((each for each in self._queues if self._running[each] < self._share), None)
            if tenant is None:
                return
            first = self._queues[tenant][0]
            self._queues.move_to_end(tenant)
            self._remove(tenant, first)
            if not first.started.done():  # else its owner was cancelled, and is about to leave
                self._running[tenant] += 1
                first.started.set_result(None)

    def _leave(self, tenant: str, mine: _Waiting) -> None:
        """Removes a job that does not wait any more; it may have been started or refused at the same moment."""
        if mine.started.done() and not mine.started.cancelled():
            if mine.started.exception() is None:
                self.give_back(tenant)
        elif mine in self._queues.get(tenant, ()):
            self._remove(tenant, mine)

    def _remove(self, tenant: str, one: _Waiting) -> None:
        queue = self._queues[tenant]
        queue.remove(one)
        if not queue:
            del self._queues[tenant]
        self.waiting -= 1
        self._bytes -= one.size


def _full() -> QueueFull:
    return QueueFull(
        "Too many jobs wait for the sandbox (sandbox.max_queued, sandbox.max_queued_bytes).", RETRY_SECONDS
    )
