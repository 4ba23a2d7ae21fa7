"""Copies on a stream of their own leave the states that they would leave in that of the steps, whichever is ahead."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from bdh_batch.engine.copy_stream import CopyStream

SLOTS = 6


class Queues:
    """Two streams whose work is done later, in any order that their waits allow."""

    def __init__(self) -> None:
        self.work: tuple[list[Callable[[], bool]], list[Callable[[], bool]]] = ([], [])
        self.reached: set[int] = set()
        self.events = self.beside = 0
        self.within = False

    def record(self, copies: bool) -> int:
        self.events += 1
        event = self.events
        self.work[copies].append(partial(done, partial(self.reached.add, event)))
        return event

    def wait(self, copies: bool, event: int) -> None:
        self.work[copies].append(lambda: event in self.reached)

    @contextmanager
    def for_copies(self) -> Iterator[None]:
        self.within, self.beside = True, self.beside + 1
        yield
        self.within = False

    def launch(self, change: Callable[[], None]) -> None:
        self.work[self.within].append(partial(done, change))

    def run(self, chance: random.Random, until: int | None = None) -> None:
        """All of it, or until an event comes to pass."""
        while any(self.work) and until not in self.reached:
            queue = chance.choice([each for each in self.work if each])
            if queue[0]():
                queue.pop(0)


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


def test_a_step_waits_for_copies_of_its_own_slots_alone() -> None:
    queues, made = Queues(), list[str]()
    stream = CopyStream(queues)
    stream.begin([0])
    with stream.copying(1, 2):
        queues.launch(partial(made.append, "copy"))
    queues.launch(partial(made.append, "step"))
    stream.begin([0])
    queues.launch(partial(made.append, "next"))
    stream.begin([2])
    queues.launch(partial(made.append, "waits"))
    steps, copies = queues.work
    while steps and steps[0]():
        steps.pop(0)
    assert made == ["step", "next"]
    while copies and copies[0]():
        copies.pop(0)
    while steps and steps[0]():
        steps.pop(0)
    assert made == ["step", "next", "copy", "waits"]
