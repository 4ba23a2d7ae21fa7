"""Calls of functions that wait for a disk or a network, on threads: bounded in number and, where they are remote, in
time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from bdh_batch.errors import StoreFailed
from bdh_batch.store.circuit import Circuit, Unreachable
from bdh_batch.system.threads import DaemonThreads

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_WAITING = 1024  # calls: beyond, the store is behind, and says so at once


@dataclass(slots=True)
class Attempt:
    """A call on its way, as the event loop and the thread that makes it both know it.

    Args:
        begun: when it got a thread, by the monotonic clock; None while it waits for one.
        left: whether nobody waits for it any more.
    """

    begun: float | None
    left: bool = False


class Calls:
    """Calls functions on a few threads, first come, first served. To be used on the event loop.

    Args:
        failures: counts failed calls by what was tried.
        seconds: that a call may take, and that it may wait for a thread before; None is no bound.

    Attributes:
        circuit: opens where what is asked does not respond; None where it is on this machine.
    """

    def __init__(self, threads: int, name: str, failures: Counter[str], seconds: float | None = None) -> None:
        self._threads = DaemonThreads(threads, name)
        self._count = threads
        self._failures = failures
        self._seconds = seconds
        self._waiting = 0
        self.circuit: Circuit | None = None

    async def call(
        self,
        what: str,
        function: Callable[..., T],
        *given: object,
        is_probe: bool = False,
        unclaimed: Callable[[T], object] | None = None,
    ) -> T:
        """Returns what a function returns.

        Args:
            is_probe: whether it is called although nothing else is, and its failure not counted.
            unclaimed: is called on a thread with what the function returns, where nobody waits for that any more: the
                caller was cancelled, or the time was over.

        Raises:
            StoreFailed: the function has raised that, or one of SQLAlchemy or of the system; or there are too many
                calls, or what is asked does not respond. It is counted as `what`.
        """
        with contextlib.nullcontext() if is_probe else self._counted(what):
            return await self._call(function, given, is_probe, unclaimed)

    def check(self, what: str) -> None:
        """Raises Unreachable, which is counted as `what`: a call would fail."""
        with self._counted(what):
            if self.circuit is not None:
                self.circuit.check()

    def submit(self, function: Callable[..., object], *given: object) -> None:
        """Calls a function some time. What it raises is nobody's."""
        self._threads.submit(function, *given)

    async def last(self, function: Callable[[], object]) -> None:
        """Calls a function once all others are done, and returns when it is, or the time is over."""
        future = asyncio.wrap_future(self._threads.submit(function))
        done, _ = await asyncio.wait([future], timeout=self._seconds)
        for each in done:
            each.result()

    @contextlib.contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreFailed as error:
            self._failures[what] += 1
            if not isinstance(error, Unreachable):
                cause = error.__cause__  # which may name a file: that is nothing for clients
                log.warning("the store failed (%s): %s", what, cause if isinstance(cause, OSError) else error)
            raise

    async def _call(
        self,
        function: Callable[..., T],
        given: tuple[object, ...],
        is_probe: bool,
        unclaimed: Callable[[T], object] | None,
    ) -> T:
        if self._waiting >= MOST_WAITING:
            raise StoreFailed(f"The store is behind: {self._waiting} calls wait for it.")
        circuit = self.circuit
        if circuit is not None and not is_probe:
            circuit.check()
        attempt = Attempt(time.monotonic() if self._waiting < self._count else None)
        self._waiting += 1
        running = self._threads.submit(self._in_thread, attempt, function, given, is_probe)
        future = asyncio.wrap_future(running)
        future.add_done_callback(self._done)  # it counts until a thread is done with it, whoever waits
        try:
            await self._wait(future, attempt)
        except asyncio.CancelledError:
            self._leave(running, attempt, unclaimed)
            raise
        if not future.done():
            self._leave(running, attempt, unclaimed)
            raise self._too_late(attempt)
        try:
            result: T = future.result()
        except (SQLAlchemyError, OSError) as error:
            problem = (isinstance(error, OSError) and error.strerror) or said(error)
            if circuit is None or not isinstance(error, circuit.errors):
                raise StoreFailed(f"The store failed: {problem}.") from error
            raise self._unreachable(problem) from error
        return result

    async def _wait(self, future: asyncio.Future[Any], attempt: Attempt) -> None:
        """Waits until a call has ended, or its time is over."""
        # asyncio.shield would log what it raises after that, from Python 3.14 on.
        await asyncio.wait([future], timeout=self._seconds)
        is_open = self.circuit is not None and self.circuit.is_open
        if self._seconds is None or future.done() or attempt.begun is None or is_open:
            return
        rest = attempt.begun + self._seconds - time.monotonic()
        if rest > 0:  # it got its thread late
            await asyncio.wait([future], timeout=rest)

    def _too_late(self, attempt: Attempt) -> StoreFailed:
        """What a call fails with that has not ended in time. One that never began says nothing of what it would ask."""
        if attempt.begun is not None:
            return self._unreachable(f"no response within {self._seconds:g} s")
        if self.circuit is not None and self.circuit.is_open:
            return Unreachable("The store cannot be reached.")
        return StoreFailed(f"The store is behind: a call has waited for others for {self._seconds:g} s.")

    def _unreachable(self, problem: str) -> Unreachable:
        assert self.circuit is not None  # as there is a network in between
        self.circuit.open(problem)
        return Unreachable("The store cannot be reached.")

    def _leave(self, running: Future[T], attempt: Attempt, unclaimed: Callable[[T], object] | None) -> None:
        """Nobody waits any more for what a thread does, or is about to do."""
        attempt.left = True
        if unclaimed is None:
            return
        event_loop = threading.get_ident()

        def clear(done: Future[T]) -> None:
            if done.exception() is not None:
                return
            if threading.get_ident() == event_loop:  # it had ended already
                self.submit(unclaimed, done.result())
            else:
                unclaimed(done.result())

        running.add_done_callback(clear)

    def _in_thread(self, attempt: Attempt, function: Callable[..., T], given: tuple[object, ...], is_probe: bool) -> T:
        if attempt.left:
            raise StoreFailed("Nobody waits for this call of the store any more.")
        if attempt.begun is None:
            attempt.begun = time.monotonic()
        if self.circuit is not None and not is_probe:
            self.circuit.check()  # it may have been reachable when the call came
        return function(*given)

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._waiting -= 1
        if not future.cancelled():
            future.exception()  # where nobody waits for it any more, asyncio would log it


@dataclass(frozen=True, slots=True)
class StoreCalls:
    """The calls of a store.

    Args:
        failures: counts those that failed.
        database: on one thread.
        files: of this machine.
        kept: of where files of states are kept; those of `files`, where that is on this machine, too.
    """

    failures: Counter[str]
    database: Calls
    files: Calls
    kept: Calls

    def close(self) -> None:
        """Ends the probes. Idempotent."""
        for calls in (self.database, self.kept):
            if calls.circuit is not None:
                calls.circuit.close()


def said(error: BaseException) -> str:
    """Returns what a database's driver, or the system, says of an error: no statement, and nothing stored."""
    text = str(error.orig if isinstance(error, DBAPIError) else error).strip()
    return text.splitlines()[0] if text else type(error).__name__
