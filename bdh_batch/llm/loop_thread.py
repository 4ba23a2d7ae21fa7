"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from bdh_batch.llm.requests import closed
from bdh_batch.system.threads import USUAL_STACK, start_daemon

T = TypeVar("T")

NAME = "bdh-llm"
LAST_SECONDS = 5.0  # for what has been cancelled to end
POLL_SECONDS = 1.0  # until an interruption is noticed that no signal to the waiting thread announces


class LoopThread:
    """Runs coroutines on an event loop in another thread, while their callers wait."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._lock = threading.Lock()
        self._stopped = False
        self._process = os.getpid()
        self._thread = start_daemon(self._run, NAME, USUAL_STACK, ends=False)

    @property
    def is_own(self) -> bool:
        """Whether the caller is on this very thread, which cannot wait for itself."""
        return threading.current_thread() is self._thread

    @property
    def is_lost(self) -> bool:
        """Whether this is a process that was forked from the thread's own: threads stay where they are."""
        return os.getpid() != self._process

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Returns what `work` returns. Where the caller is interrupted meanwhile, `work` is cancelled, and has ended
        when the interruption goes on.

        Raises Unavailable: the thread has been stopped; RuntimeError: it is another process's.
        """
        assert not self.is_own
        if self.is_lost:
            work.close()
            raise RuntimeError("This model is in the process that this one was forked from; load one here, or spawn.")
        ended = threading.Event()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            task = self._loop.create_task(work)
            tasks.append(task)
            task.add_done_callback(lambda _: ended.set())

        if not self.call(start):
            work.close()
            raise closed()
        try:
            while not ended.wait(POLL_SECONDS):
                pass
        except BaseException:
            self.call(lambda: tasks[0].cancel())
            ended.wait()
            if not tasks[0].cancelled():
                tasks[0].exception()  # which nobody asks for any more
            raise
        try:
            return tasks[0].result()
        except asyncio.CancelledError:  # the thread was stopped by another one
            raise closed() from None

    def call(self, function: Callable[[], object]) -> bool:
        """Has the thread call `function`. False where it has been stopped, or is another process's."""
        if self.is_lost:
            return False
        with self._lock:
            if not self._stopped:
                self._loop.call_soon_threadsafe(function)
            return not self._stopped

    def stop(self) -> None:
        """Ends the thread, once what runs has been cancelled. Idempotent."""
        with self._lock:
            first, self._stopped = not self._stopped, True
            if first:
                self._loop.call_soon_threadsafe(self._loop.stop)
        if not self.is_own:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_cancel_all())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def _cancel_all() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=LAST_SECONDS)
