"""States on their way from and to files, as the scheduler plans it: no file is read or written here."""

from __future__ import annotations

import pytest

from bdh_batch.errors import GenerationFailed
from bdh_batch.messages import Delta
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.transfers import Save
from tests.scheduler.fakes import FakeRunner, expected_tokens, make_sequence

PROMPT = [7 * at % 251 for at in range(40)]


def scheduler_of(slots: int = 2, cached: bool = True, transfers: int = 2) -> Scheduler:
    return Scheduler(slots, 64, Policy(cache_prefixes=cached, min_shared=4, transfer_slots=transfers))


def run(scheduler: Scheduler, runner: FakeRunner) -> tuple[dict[Sequence, list[Delta]], list[Save]]:
    """Runs until there is no more to do. Returns what each sequence gained, and the states that were to be saved."""
    gained: dict[Sequence, list[Delta]] = {}
    saves: list[Save] = []
    while scheduler.has_work:
        step = scheduler.plan(0.0)
        assert step is not None
        for sequence, delta in scheduler.commit(step, runner.run(step.plan), 0.0):
            gained.setdefault(sequence, []).append(delta)
        saves += step.saves
        scheduler.transfers.give(scheduler.transfers.take_left())
        scheduler.check()
    return gained, saves


def saved_by(runner: FakeRunner, scheduler: Scheduler) -> Save:
    sequence = make_sequence(PROMPT, 5)
    sequence.save_to = "file"
    scheduler.submit([sequence])
    _, (save,) = run(scheduler, runner)
    return save


@pytest.mark.parametrize("cached", [True, False])
def test_a_state_is_copied_to_a_transfer_slot_before_its_slot_is_used_again(cached: bool) -> None:
    runner, scheduler = FakeRunner(), scheduler_of(slots=1, cached=cached)
    first, next_one = make_sequence(PROMPT, 5), make_sequence([9] * 30, 5)
    first.save_to = "file"
    scheduler.submit([first, next_one])
    gained, (save,) = run(scheduler, runner)
    assert runner.slots[save.slot] == PROMPT + expected_tokens(PROMPT, 4)  # the last token has not entered it
    assert save.state.tokens == len(PROMPT) + 4
    assert sum(delta.ends for delta in gained[first]) == 1
    ((ended, delta),) = scheduler.saved(save, None)
    assert (ended, delta.saved, delta.save_error, delta.ends) == (first, save.state, None, 1)


def test_where_no_transfer_slot_is_free_the_last_delta_says_so() -> None:
    scheduler = scheduler_of(transfers=0)
    sequence = make_sequence(PROMPT, 5)
    sequence.save_to = "file"
    scheduler.submit([sequence])
    gained, saves = run(scheduler, FakeRunner())
    assert (saves, gained[sequence][-1].save_error, gained[sequence][-1].ends) == (
        [],
        "Too many states are being written.",
        2,
    )


def test_a_step_that_fails_says_that_nothing_was_saved_and_gives_the_slot_back() -> None:
    runner, scheduler = FakeRunner(), scheduler_of(transfers=1)
    sequence = make_sequence(PROMPT, 1)
    sequence.save_to = "file"
    scheduler.submit([sequence])
    while (step := scheduler.plan(0.0)) is not None and not step.saves:
        scheduler.commit(step, runner.run(step.plan), 0.0)
    assert step is not None
    ((ended, delta),) = scheduler.fail(step, GenerationFailed("broken"))
    assert (ended, delta.saved) == (sequence, None)
    assert delta.save_error
    assert saved_by(runner, scheduler).state.tokens == len(PROMPT) + 4


def test_a_sequence_that_fails_says_that_nothing_was_saved() -> None:
    scheduler = scheduler_of()
    sequence = make_sequence(PROMPT, 5)
    sequence.save_to = "file"
    scheduler.submit([sequence])
    ((_, delta),) = scheduler.abort([sequence], GenerationFailed("broken"))
    assert (delta.ends, bool(delta.save_error)) == (2, True)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_sequences_begin_in_a_loaded_state_and_its_slot_comes_back(cached: bool, slots: int) -> None:
    runner = FakeRunner()
    scheduler = scheduler_of(slots=slots, cached=cached)
    slot = scheduler.transfers.take_for_load()
    assert slot is not None
    assert scheduler.transfers.take_for_load() is None  # the other one is left for states that are written
    runner.slots[slot] = PROMPT[:30]
    forks = [make_sequence(PROMPT, 6) for _ in range(5)]
    entry = scheduler.sharing.entry_of(forks[0], 30, slot)
    for fork in forks:
        fork.prefix.loaded = entry
        entry.awaited += 1
    scheduler.submit(forks)
    gained, _ = run(scheduler, runner)
    for fork in forks:
        assert [token for delta in gained[fork] for token in delta.tokens] == expected_tokens(PROMPT, 6)
        assert fork.prefix.cached >= 30
    assert runner.computed <= len(forks) * (10 + 5)  # nothing of the state was computed again
    assert scheduler.transfers.take_for_load() is not None


def test_a_sequence_that_ends_before_it_begins_leaves_its_loaded_state() -> None:
    scheduler = scheduler_of()
    slot = scheduler.transfers.take_for_load()
    assert slot is not None
    sequence = make_sequence(PROMPT, 6)
    sequence.prefix.loaded = scheduler.sharing.entry_of(sequence, 30, slot)
    sequence.prefix.loaded.awaited += 1
    scheduler.submit([sequence])
    scheduler.abort([sequence])
    assert scheduler.transfers.take_left() == [slot]
