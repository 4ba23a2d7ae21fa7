"""Work that would hold up the event loop goes to a thread: one piece of it at a time, tenants by turns.

A thread shares the interpreter's lock with the loop and the engine: several at once would leave less to those.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

LARGE = 16384  # bytes of a body, or about as many microseconds of work: what is less is done at once
THREAD = "bdh-large-bodies"


class OffLoop:
    """Runs the long work of all requests, in a thread that does not keep the program from ending."""

    def __init__(self) -> None:
        self._busy = False
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # by tenant, the next one first

    def of(self, tenant: str) -> Aside:
        return Aside(self, tenant)

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Who gives up waiting leaves the queue; work that has begun is finished."""
        await self._turn(tenant)
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()
        threading.Thread(target=self._work, args=(loop, work, outcome), name=THREAD, daemon=True).start()
        return await outcome

    async def _turn(self, tenant: str) -> None:
        if not self._busy:
            self._busy = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just come
                self._next()
            raise

    def _next(self) -> None:
        """Gives the turn to a request of the tenant that has waited longest for one."""
        while self._queues:
            tenant, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[tenant] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False

    def _work(self, loop: asyncio.AbstractEventLoop, work: Callable[[], T], outcome: asyncio.Future[T]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - whoever waits for the outcome gets it
            self._tell(loop, outcome, outcome.set_exception, error)
        else:
            self._tell(loop, outcome, outcome.set_result, result)

    def _tell(
        self, loop: asyncio.AbstractEventLoop, outcome: asyncio.Future[T], settle: Callable[[Any], None], value: object
    ) -> None:
        def told() -> None:
            self._next()
            if not outcome.done():
                settle(value)

        if not loop.is_closed():
            loop.call_soon_threadsafe(told)


@dataclass(frozen=True, slots=True)
class Aside:
    """Where a tenant's long work is done."""

    off_loop: OffLoop
    tenant: str

    async def run(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` makes of `arguments`: at once where its `size` is small, else off the event loop."""
        if size <= LARGE:
            return work(*arguments)
        return await self.off_loop.run(self.tenant, lambda: work(*arguments))
