"""What the engine's thread hands over is delivered whole and in order, with few wake-ups of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from bdh_batch.engine.hand_over import INTERVAL, HandOver
from bdh_batch.messages import Delta
from tests.scheduler.fakes import FakeOutbox, make_sequence


class Loop:
    """An event loop whose callbacks run when a test says so."""

    def __init__(self) -> None:
        self.wake_ups: list[Callable[[], None]] = []
        self.timers: list[Callable[[], None]] = []
        self.closed = False

    def is_closed(self) -> bool:
        return self.closed

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.wake_ups.append(function)

    def call_later(self, delay: float, function: Callable[[], None]) -> None:
        assert delay == INTERVAL
        self.timers.append(function)


def handing() -> tuple[Loop, FakeOutbox, Callable[[str], bool]]:
    """A loop, the outbox on it, and what hands text over to that."""
    loop, outbox = Loop(), FakeOutbox()
    hand_over = HandOver(cast(asyncio.AbstractEventLoop, loop))
    sequence = make_sequence([1], 9, outbox=outbox)
    return loop, outbox, lambda text: hand_over.put([(sequence, Delta(text))])


def test_what_comes_after_a_wake_up_waits_for_the_next_look() -> None:
    loop, outbox, put = handing()
    assert put("a")
    assert put("b")
    loop.wake_ups.pop()()
    assert [delta.text for delta in outbox.deltas] == ["a", "b"]
    for text in "cd":
        put(text)
    assert (loop.wake_ups, len(outbox.deltas)) == ([], 2)
    loop.timers.pop()()
    assert [delta.text for delta in outbox.deltas] == [*"abcd"]


def test_it_stops_looking_when_nothing_has_come_and_is_woken_again() -> None:
    loop, outbox, put = handing()
    put("a")
    loop.wake_ups.pop()()
    loop.timers.pop()()
    assert (loop.wake_ups, loop.timers) == ([], [])
    put("b")
    loop.wake_ups.pop()()
    assert [delta.text for delta in outbox.deltas] == ["a", "b"]


@pytest.mark.parametrize("looks", [False, True])
def test_it_reports_that_the_loop_is_closed(looks: bool) -> None:
    loop, _outbox, put = handing()
    if looks:
        put("a")
        loop.wake_ups.pop()()
    loop.closed = True
    assert not put("b")
