"""Calls on threads: what nobody waits for any more counts until a thread is done with it, and leaves
nothing; what waits for others says nothing of whether a store responds."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter

import pytest

from bdh_batch.errors import StoreFailed
from bdh_batch.store import calls as module
from bdh_batch.store.calls import Attempt, Calls
from bdh_batch.store.circuit import Circuit, Unreachable
from tests.conftest import HANG_SECONDS, eventually


async def test_calls_whose_callers_leave_are_bounded_and_what_comes_of_them_is_cleared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    calls, begun, goes = Calls(1, "test", Counter()), threading.Event(), threading.Event()
    made: list[int] = []
    cleared: list[int] = []

    def make(number: int) -> int:
        begun.set()
        goes.wait(HANG_SECONDS)
        made.append(number)
        return number

    waiting = [asyncio.create_task(calls.call("read", make, each, unclaimed=cleared.append)) for each in range(3)]
    await asyncio.to_thread(begun.wait, HANG_SECONDS)
    for each in waiting:
        each.cancel()
    await asyncio.wait(waiting)
    with pytest.raises(StoreFailed, match="3 calls wait"):
        await calls.call("read", make, 3)
    goes.set()
    await asyncio.to_thread(eventually, lambda: cleared == [0])
    assert await calls.call("read", make, 4) == 4
    assert made == [0, 4], "what nobody waited for before it began was not called"
    del waiting
    gc.collect()
    assert [each.name for each in caplog.records if each.name == "asyncio"] == [], "errors that are nobody's"


async def test_a_call_that_waits_for_others_until_its_time_is_over_opens_no_circuit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def probe() -> None:
        """It responds."""

    calls, goes = Calls(1, "test", Counter()), threading.Event()
    circuit = calls.circuit = Circuit("It", (OSError,), probe, seconds=HANG_SECONDS)
    other = asyncio.create_task(calls.call("read", goes.wait, HANG_SECONDS))  # it may take long
    await asyncio.sleep(0)
    monkeypatch.setattr(calls, "_seconds", 0.0)
    with pytest.raises(StoreFailed, match="The store is behind") as behind:
        await calls.call("read", time.monotonic)
    assert not isinstance(behind.value, Unreachable)
    assert not circuit.is_open
    goes.set()
    assert await other
    await asyncio.to_thread(eventually, lambda: not calls._waiting)  # what is late is done with, too

    goes.clear()
    with pytest.raises(Unreachable):
        await calls.call("read", goes.wait, HANG_SECONDS)
    assert circuit.is_open, "it had a thread"
    with pytest.raises(Unreachable):
        await calls.call("read", time.monotonic)
    goes.set()
    circuit.close()


async def test_the_time_of_a_call_that_waited_begins_when_it_gets_a_thread() -> None:
    calls, ends = Calls(1, "test", Counter(), seconds=0.0), asyncio.get_running_loop().create_future()
    late = Attempt(begun=time.monotonic() + HANG_SECONDS)
    waiting = asyncio.create_task(calls._wait(ends, late))
    for _ in range(10):  # its first wait is over then
        await asyncio.sleep(0)
    assert not waiting.done()
    ends.set_result(None)
    await waiting
