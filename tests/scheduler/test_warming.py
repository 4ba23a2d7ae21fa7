"""States that are read before anyone asks for them: only while the engine is idle, and only where there is room."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from bdh_batch.engine.state_traffic import INTERRUPTED, Done
from bdh_batch.engine.warming import Outcome, Warming
from bdh_batch.messages import SavedState
from bdh_batch.scheduler.copies import Save
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.prefixes import pack
from bdh_batch.scheduler.scheduler import Scheduler, Update
from bdh_batch.scheduler.sequence import Prefix, Sequence
from bdh_batch.scheduler.transfers import Load
from tests.scheduler.fakes import FakeRunner, make_sequence

PROMPT = [7 * at % 251 for at in range(40)]


class Reads:
    """Notes which states are to be read, and when they should stop; reads none by itself."""

    def __init__(self) -> None:
        self.begun: list[tuple[Load, Done, Callable[[], bool]]] = []

    def back(self, slot: int) -> None:
        """A fake state takes no memory."""

    def read(self, load: Load, done: Done) -> None:
        raise AssertionError("nobody waits for a state")

    def read_ahead(self, load: Load, done: Done, goes_on: Callable[[], bool]) -> None:
        self.begun.append((load, done, goes_on))

    def write(self, save: Save, done: Done) -> None:
        raise AssertionError("no state is saved")


class Engine:
    """What a worker does with states that are to be read, without its thread."""

    def __init__(self, slots: int = 8, cached: bool = True, transfers: int = 2) -> None:
        policy = Policy(cache_prefixes=cached, min_shared=4, transfer_slots=transfers)
        self.scheduler, self.runner, self.reads = Scheduler(slots, 64, policy), FakeRunner(), Reads()
        self.warming = Warming(self.scheduler, self.reads, self._post)

    def wants(self, prompt: list[int], prefix: Prefix | None = None) -> Outcome:
        outcome = Outcome()
        self.warming.add(SavedState("file", len(prompt)), pack(prompt), prefix or Prefix(), outcome)
        self.warming.go_on()
        return outcome

    def _post(self, message: Callable[[], list[Update]]) -> None:
        assert message() == []

    def ends(self, error: str | None = None) -> None:
        load, done, _ = self.reads.begun.pop()
        self.runner.slots[load.slot] = array("i", load.tokens).tolist()
        done(error)
        self.compute()

    def compute(self) -> None:
        while self.scheduler.has_work:
            step = self.scheduler.plan(0.0)
            assert step is not None
            self.scheduler.commit(step, self.runner.run(step.plan), 0.0)
            self.scheduler.transfers.give(self.scheduler.transfers.take_left())
            check_invariants(self.scheduler)
        self.warming.go_on()


def test_a_state_is_cached_before_anyone_asks_and_for_those_alone_whose_it_is() -> None:
    engine = Engine()
    mine = Prefix("key", "salt")
    outcome = engine.wants(PROMPT[:30], mine)
    engine.ends()
    assert outcome.result(0) == "cached"
    assert (engine.scheduler.sharing.hits, engine.scheduler.sharing.queries, engine.runner.computed) == (0, 0, 0)
    for prefix, found in ((Prefix("key"), 0), (Prefix("other", "salt"), 0), (Prefix("key", "salt"), 30)):
        sequence = make_sequence(PROMPT, 4)
        sequence.prefix, sequence.state, sequence.state_optional = prefix, None, True
        if found:
            sequence.state = SavedState("file", 30)  # which nobody has to read: `Reads.read` would fail
        engine.scheduler.submit([sequence])
        engine.compute()
        assert sequence.prefix.cached == found
    assert engine.wants(PROMPT[:30], mine).result(0) == "cached"  # it is there, and not read again
    assert not engine.reads.begun


def test_a_request_has_the_reading_stop_and_it_begins_again_once_the_engine_is_idle() -> None:
    engine = Engine(slots=16, transfers=1)
    outcome = engine.wants(PROMPT[:30])
    ((_, done, goes_on),) = engine.reads.begun
    assert goes_on()
    sequence = make_sequence([9] * 12, 4)
    engine.scheduler.submit([sequence])
    assert not goes_on()
    engine.reads.begun.clear()
    done(INTERRUPTED)
    assert engine.scheduler.transfers._slots.free_count == 1  # it takes nothing from those who run
    engine.compute()
    assert not outcome.done()
    engine.ends()
    assert outcome.result(0) == "cached"


def test_no_more_are_read_than_leave_most_of_the_memory_to_requests() -> None:
    engine = Engine(slots=8)
    for number in range(2):  # a quarter
        outcome = engine.wants([number, *PROMPT])
        engine.ends()
        assert outcome.result(0) == "cached"
    assert engine.wants([2, *PROMPT]).result(0) == "no room"
    sequences: list[Sequence] = [make_sequence([number, *PROMPT, 1], 3) for number in range(20)]
    engine.scheduler.submit(sequences)
    engine.compute()
    assert [sequence.prefix.cached for sequence in sequences[:3]] == [41, 41, 0]
    assert all(sequence.finish_reason is not None for sequence in sequences)
    for without in (Engine(cached=False), Engine(transfers=2, slots=1)):
        first = without.wants(PROMPT)
        if not without.reads.begun:
            assert first.result(0) == "no room"
            continue
        without.ends()  # the only slot: whoever comes takes it
        sequence = make_sequence([9] * 12, 4)
        without.scheduler.submit([sequence])
        without.compute()
        assert sequence.finish_reason is not None


def test_what_cannot_be_read_or_is_not_wanted_any_more_leaves_nothing() -> None:
    engine = Engine()
    outcome = engine.wants(PROMPT)
    waits, left = Outcome(), Outcome()
    for each in (left, waits):
        engine.warming.add(SavedState("file", 3), pack(PROMPT[:3]), Prefix(), each)
    assert left.cancel()
    engine.ends("it is damaged.")
    assert outcome.result(0) == "unreadable"
    engine.ends()
    assert waits.result(0) == "cached"
    assert len(engine.scheduler.sharing.cache) == 1
    assert engine.scheduler.transfers._slots.free_count == 2
