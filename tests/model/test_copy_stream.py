"""Copies on a stream of their own leave the states that they would leave in that of the steps, whichever is ahead."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count

import pytest

from bdh_batch.engine.copy_stream import CopyStream

SLOTS = 6
EVENTS = count(1)


class Queue:
    """A stream whose work is done later. An event is a number, which is in `complete` once it is."""

    def __init__(self, complete: set[int]) -> None:
        self.work: list[Callable[[], bool]] = []
        self._complete = complete

    def record_event(self) -> int:
        event = next(EVENTS)
        self.work.append(partial(done, partial(self._complete.add, event)))
        return event

    def wait_event(self, event: int) -> None:
        self.work.append(lambda: event in self._complete)

    def run(self) -> None:
        """As far as it need not wait."""
        while self.work and self.work[0]():
            self.work.pop(0)


class Queues:
    """Two streams whose work is done in any order that their waits allow."""

    def __init__(self) -> None:
        self.complete: set[int] = set()
        self.steps, self.copies = Queue(self.complete), Queue(self.complete)
        self.beside = 0
        self._current = self.steps

    @contextmanager
    def for_copies(self) -> Iterator[None]:
        self._current, self.beside = self.copies, self.beside + 1
        try:
            yield
        finally:
            self._current = self.steps

    def launch(self, change: Callable[[], None]) -> None:
        self._current.work.append(partial(done, change))

    def run(self, chance: random.Random, until: int | None = None) -> None:
        """All of it, or until an event is complete."""
        while (self.steps.work or self.copies.work) and until not in self.complete:
            work = chance.choice([each.work for each in (self.steps, self.copies) if each.work])
            if work[0]():
                work.pop(0)


def done(change: Callable[[], None]) -> bool:
    change()
    return True


def copy(states: list[int], source: int, target: int) -> None:
    states[target] = states[source]


def compute(states: list[int], used: list[int], step: int) -> None:
    for slot in used:
        states[slot] = states[slot] * 31 + step


def test_states_are_those_of_one_stream_in_any_order_that_the_waits_allow() -> None:
    beside = 0
    for seed in range(300):
        chance, queues = random.Random(seed), Queues()
        stream = CopyStream(queues)
        states, right = list(range(SLOTS)), list(range(SLOTS))

        for step in range(8):
            used = chance.sample(range(SLOTS), chance.randint(0, 3))
            stream.begin(used)
            for _ in range(chance.randint(0, 3)):
                source, target = chance.sample(range(SLOTS), 2)
                with stream.copying(source, target):
                    queues.launch(partial(copy, states, source, target))
                copy(right, source, target)
            queues.launch(partial(compute, states, used, step))
            compute(right, used, step)
            if chance.random() < 0.2:
                queues.run(chance, stream.all_begun())
                assert states == right
        queues.run(chance)
        assert states == right
        beside += queues.beside
    assert beside > 1000, "of some 3,600 copies"


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_waits_for_copies_of_its_own_slots_alone(fails: bool) -> None:
    """For those of which a part was launched, too."""
    queues, made = Queues(), list[str]()
    stream = CopyStream(queues)
    stream.begin([0])
    with pytest.raises(MemoryError) if fails else nullcontext(), stream.copying(1, 2):
        queues.launch(partial(made.append, "copy"))
        if fails:
            raise MemoryError
    queues.launch(partial(made.append, "step"))
    stream.begin([0])
    queues.launch(partial(made.append, "next"))
    stream.begin([2])
    queues.launch(partial(made.append, "waits"))
    queues.steps.run()
    assert made == ["step", "next"]
    queues.copies.run()
    queues.steps.run()
    assert made == ["step", "next", "copy", "waits"]
