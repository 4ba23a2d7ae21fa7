"""Calls on threads: what nobody waits for any more counts until a thread has had it, and leaves nothing."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter

import pytest

from bdh_batch.errors import StoreFailed
from bdh_batch.store import calls as module
from bdh_batch.store.calls import Calls
from tests.conftest import eventually


async def test_calls_whose_callers_leave_are_bounded_and_what_comes_of_them_is_cleared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    calls, begun, goes = Calls(1, "test", Counter()), threading.Event(), threading.Event()
    made: list[int] = []
    cleared: list[int] = []

    def make(number: int) -> int:
        begun.set()
        goes.wait()
        made.append(number)
        return number

    waiting = [asyncio.create_task(calls.call("read", make, each, unclaimed=cleared.append)) for each in range(3)]
    await asyncio.to_thread(begun.wait)
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
