"""Threads that never keep the program from ending, with stacks that deep native recursion fits into."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Calls = SimpleQueue[Callable[[], None] | None]  # None ends a thread

STACK = 64 * 2**20  # bytes; address space alone, as long as it is not used
USUAL_STACK = 0  # is what the system gives

_under_way: set[int] = set()  # calls that are submitted, by their identity
_named: set[str] = set()  # threads that should end
_starting = threading.Lock()  # the size of a stack is an option of the whole program


class Executor(Protocol):
    """Runs functions on other threads, as `concurrent.futures` does."""

    def submit(self, function: Callable[..., T], /, *arguments: Any) -> Future[T]: ...


def start_daemon(target: Callable[[], object], name: str, stack: int = STACK, ends: bool = True) -> threading.Thread:
    """Starts a daemon thread with a stack of so many bytes.

    Args:
        ends: whether it should have ended when the program does; else it waits for calls for as long as there is one.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    if ends:
        _named.add(name)
    with _starting:
        usual = threading.stack_size(stack)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return thread


def in_daemon_thread(function: Callable[[], T], name: str) -> asyncio.Future[T]:
    """As asyncio.to_thread, but the program can end while the thread still runs. Call it on the event loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], object] = future.set_result, function()
        except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
            outcome = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    start_daemon(run, name, USUAL_STACK)
    return future


class DaemonThreads:
    """A few threads that call functions, first come, first served. They end once nobody has this object any more.
    Any thread may submit calls, these among them.

    `concurrent.futures` waits for its threads when the interpreter ends; nothing waits for these.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._calls: Calls = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._growing = threading.Lock()
        weakref.finalize(self, _end, self._calls, self._threads).atexit = False

    def submit(self, function: Callable[..., T], /, *arguments: Any) -> Future[T]:
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
                future.set_exception(error)
            else:
                future.set_result(result)

        _under_way.add(id(call))  # before it is begun: nobody can tell when that will be
        self._calls.put(call)
        with self._growing:
            if len(self._threads) < self._count:
                self._threads.append(start_daemon(partial(_serve, self._calls), self._name, ends=False))
        return future


def _serve(calls: Calls) -> None:
    while (call := calls.get()) is not None:
        call()
        _under_way.discard(id(call))
        del call  # what it held is not kept until the next one comes


def _end(calls: Calls, threads: Sequence[threading.Thread]) -> None:
    for _ in threads:
        calls.put(None)


def left_behind() -> bool:
    """Whether a daemon thread is still at work: the interpreter must not be taken down under its native code."""
    return bool(_under_way) or any(thread.name in _named for thread in threading.enumerate())
