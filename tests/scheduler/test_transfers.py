"""States on their way from and to files, as the scheduler plans it: no file is read or written here."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from bdh_batch.errors import GenerationFailed, InvalidRequest
from bdh_batch.messages import Delta, SavedState
from bdh_batch.scheduler.copies import CopyLimits, Save
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler, Update
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.transfers import Load
from tests.scheduler.fakes import FakeRunner, expected_tokens, make_sequence

PROMPT = [7 * at % 251 for at in range(40)]


def scheduler_of(slots: int = 2, cached: bool = True, transfers: int = 2) -> Scheduler:
    return Scheduler(slots, 64, Policy(cache_prefixes=cached, min_shared=4, transfer_slots=transfers))


def run(
    scheduler: Scheduler, runner: FakeRunner, read: Callable[[Load], list[int]] | None = None
) -> tuple[dict[Sequence, list[Delta]], list[Save]]:
    """Runs until there is no more to do. Returns what each sequence gained, and the states that were to be saved."""
    gained: dict[Sequence, list[Delta]] = {}
    saves: list[Save] = []
    while scheduler.has_work:
        updates: list[Update] = []
        if (step := scheduler.plan(0.0)) is not None:
            updates += scheduler.commit(step, runner.run(step.plan), 0.0)
            saves += step.saves
        for load in scheduler.transfers.take_loads():
            if read is not None:
                runner.slots[load.slot] = read(load)
            updates += scheduler.loaded(load, "it is not there." if read is None else None)
        for sequence, delta in updates:
            gained.setdefault(sequence, []).append(delta)
        scheduler.transfers.give(scheduler.transfers.take_left())
        check_invariants(scheduler)
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
    ((ended, delta),) = scheduler.files.saved(save, None)
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


def forks_of(tokens: int, count: int = 5, optional: bool = False) -> list[Sequence]:
    forks = [make_sequence(PROMPT, 6) for _ in range(count)]
    for fork in forks:
        fork.state, fork.state_optional = SavedState("file", tokens), optional
    return forks


class Files:
    """Gives the tokens of states that are read, and counts how often that is."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, load: Load) -> list[int]:
        self.read += 1
        return array("i", load.tokens).tolist()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_sequences_begin_in_a_state_that_is_read_and_its_slot_comes_back(cached: bool, slots: int) -> None:
    runner, files = FakeRunner(), Files()
    scheduler = scheduler_of(slots=slots, cached=cached)
    forks = forks_of(30)
    scheduler.submit(forks)
    gained, _ = run(scheduler, runner, files)
    for fork in forks:
        assert [token for delta in gained[fork] for token in delta.tokens] == expected_tokens(PROMPT, 6)
        assert fork.prefix.cached >= 30
    assert runner.computed <= len(forks) * (10 + 5)  # nothing of the state was computed again
    assert files.read <= (1 if cached and slots > 1 else len(forks))
    scheduler.submit(forks_of(30))
    run(scheduler, runner, files)
    assert len(scheduler.transfers.take_loads()) == 0


def test_a_state_that_was_read_is_cached_for_those_who_come_later() -> None:
    runner, files, scheduler = FakeRunner(), Files(), scheduler_of(slots=4)
    for _ in range(3):
        scheduler.submit(forks_of(30, count=1))
        run(scheduler, runner, files)
    assert files.read == 1


def test_the_first_to_begin_in_a_state_waits_for_no_copy_for_others_and_the_second_makes_one() -> None:
    scheduler, moves, known = scheduler_of(slots=8), [], []
    for number in range(2):
        fork = make_sequence([*PROMPT[:30], *[100 + number] * 10], 1)
        fork.state = SavedState("file", 30)
        scheduler.submit([fork])
        runner = FakeRunner()
        assert scheduler.plan(0.0) is None
        (load,) = scheduler.transfers.take_loads()
        runner.slots[load.slot] = PROMPT[:30]
        scheduler.loaded(load, None)
        step = scheduler.plan(0.0)
        assert step is not None
        moves.append([copy.moves for copy in step.plan.copies])
        known.append(any(entry.length == 30 for entry in scheduler.sharing.cache))
        scheduler.commit(step, runner.run(step.plan), 0.0)
        run(scheduler, runner)
    assert (moves, known) == ([[True], [False, False]], [False, True])


def test_a_turn_that_goes_on_from_a_state_takes_as_many_steps_as_a_first_one() -> None:
    """Though a conversation has other prefixes just behind the state that it goes on from."""
    steps = []
    for begun, breaks in ((0, ()), (200, (201, 202))):
        scheduler = Scheduler(8, 512, Policy(min_shared=32, transfer_slots=2))
        turn = make_sequence([number % 251 for number in range(begun + 60)], 1)
        turn.prefix.breaks = breaks
        turn.state = SavedState("file", begun) if begun else None
        scheduler.submit([turn])
        runner, files, computed = FakeRunner(), Files(), 0
        while scheduler.has_work:
            if (step := scheduler.plan(0.0)) is not None:
                computed += bool(step.sequences)
                scheduler.commit(step, runner.run(step.plan), 0.0)
            for load in scheduler.transfers.take_loads():
                runner.slots[load.slot] = files(load)
                scheduler.loaded(load, None)
        steps.append(computed)
    assert steps[0] == steps[1]


def test_where_it_cannot_be_read_a_sequence_fails_or_computes_it_from_the_tokens() -> None:
    runner, scheduler = FakeRunner(), scheduler_of()
    strict, lenient = forks_of(30, count=1) + forks_of(30, count=1, optional=True)
    scheduler.submit([strict])
    while scheduler.has_work:
        assert scheduler.plan(0.0) is None
        (load,) = scheduler.transfers.take_loads()
        ((failed, delta),) = scheduler.loaded(load, "it is not there.")
        assert failed is strict
        assert isinstance(delta.error, InvalidRequest)
        assert delta.error.param == "state"
    scheduler.submit([lenient])
    gained, _ = run(scheduler, runner)
    assert [token for delta in gained[lenient] for token in delta.tokens] == expected_tokens(PROMPT, 6)
    assert lenient.prefix.cached == 0


def test_who_has_begun_is_computed_again_where_the_state_has_gone() -> None:
    runner, scheduler = FakeRunner(), scheduler_of(cached=False)
    sequence, beside = forks_of(30, count=1)[0], make_sequence([9] * 30, 20)
    scheduler.submit([sequence, beside])
    files = Files()
    for _ in range(3):
        if (step := scheduler.plan(0.0)) is not None:
            scheduler.commit(step, runner.run(step.plan), 0.0)
        for load in scheduler.transfers.take_loads():
            runner.slots[load.slot] = files(load)
            scheduler.loaded(load, None)
    assert sequence.generated
    step = scheduler.plan(0.0)
    assert step is not None
    scheduler.out_of_memory(step)  # its state is lost
    gained, _ = run(scheduler, runner)
    assert gained[sequence][-1].error is None
    assert sequence.generated == expected_tokens(PROMPT, 6)


def test_sequences_that_end_while_they_wait_leave_no_slot_behind() -> None:
    scheduler = scheduler_of()
    forks = forks_of(30)
    scheduler.submit(forks)
    assert scheduler.plan(0.0) is None
    scheduler.abort(forks[:1])
    (load,) = scheduler.transfers.take_loads()
    scheduler.abort(forks[1:])
    scheduler.loaded(load, None)
    assert not scheduler.has_work
    check_invariants(scheduler)
    late, kept = forks_of(30, count=1), forks_of(29, count=1)
    scheduler.submit([*late, *kept])
    scheduler.plan(0.0)
    scheduler.abort(late)  # nobody reads it yet
    (load,) = scheduler.transfers.take_loads()
    assert load.state.tokens == 29
    scheduler.loaded(load, None)
    scheduler.abort(kept)  # it was read, and nobody begins there
    assert scheduler.transfers.take_left() == [load.slot]


def test_memory_is_made_ready_for_states_that_will_be_saved_and_goes_when_it_is_idle() -> None:
    runner = FakeRunner()
    scheduler = Scheduler(2, 64, Policy(transfer_slots=4, idle_release=10.0, cache_prefixes=False))
    assert scheduler.transfers.back(0.0) == []
    sequence = make_sequence(PROMPT, 2)
    sequence.save_to = "file"
    scheduler.submit([sequence])
    ready = scheduler.transfers.back(0.0)
    assert len(ready) == 1
    assert scheduler.transfers.back(0.0) == []
    _, (save,) = run(scheduler, runner)
    assert [save.slot] == ready
    scheduler.files.saved(save, None)
    released: list[int] = []
    while (step := scheduler.plan(20.0)) is not None:
        released += step.plan.releases
        scheduler.commit(step, runner.run(step.plan), 20.0)
    assert save.slot in released
    assert scheduler.allocator.release_due is None


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("most", "rounded"), [(1, 1), (2, 1), (10, 3), (None, 1)])
def test_a_step_has_no_more_copies_than_there_is_time_for(parts: int, most: int | None, rounded: int) -> None:
    runner, files = FakeRunner(), Files()
    limits = CopyLimits(parts, most, rounded)
    scheduler = Scheduler(6, 512, Policy(min_shared=4, transfer_slots=8, copies=limits, cache_prefixes=True))
    saving = [make_sequence([number] * 40, 3) for number in range(4)]
    for sequence in saving:
        sequence.save_to = "file"
    scheduler.submit([*saving, *forks_of(30, count=12)])
    moved, saves = [0], 0
    while scheduler.has_work:
        if (step := scheduler.plan(0.0)) is not None:
            moved.append(sum(copy.end - copy.begin for copy in step.plan.copies if not copy.moves))
            saves += len(step.saves)
            scheduler.commit(step, runner.run(step.plan), 0.0)
            for save in step.saves:
                assert runner.slots[save.slot] == save.sequence.known(0, save.state.tokens)
                scheduler.files.saved(save, None)
        for load in scheduler.transfers.take_loads():
            runner.slots[load.slot] = files(load)
            scheduler.loaded(load, None)
        scheduler.transfers.give(scheduler.transfers.take_left())
        check_invariants(scheduler)
    assert saves == 4
    assert max(moved) <= (most or 99)
    assert sum(moved) == parts * runner.copies


@pytest.mark.parametrize("swaps", [True, False])
def test_what_is_rounded_on_its_way_to_the_host_counts_as_what_it_takes(swaps: bool) -> None:
    limits = CopyLimits(parts=4, most=6, rounded=5)
    policy = Policy(host_slots=4, swaps=swaps, min_shared=4, copies=limits, cache_prefixes=True, time_slice=2)
    scheduler, runner = Scheduler(3, 512, policy), FakeRunner()
    prompts = [[number, *PROMPT] for number in range(4)]
    for turn in range(3):
        scheduler.submit([make_sequence(prompt * (turn + 1), 4) for prompt in prompts])
        while scheduler.has_work:
            step = scheduler.plan(0.0)
            assert step is not None
            cost = sum((copy.end - copy.begin) * (5 if 3 <= max(copy[:2]) < 7 else 1) for copy in step.plan.copies)
            assert cost <= 6
            busy = scheduler.allocator.copies.busy
            assert all(segment.slot not in busy for segment in step.plan.segments)
            scheduler.commit(step, runner.run(step.plan), 0.0)
            check_invariants(scheduler)
    assert runner.copies


def test_a_failed_step_has_those_computed_again_whose_copies_were_not_made() -> None:
    """The first one's prefix is cached: it goes on in a copy, which takes two steps. The step between them fails."""
    policy = Policy(min_shared=4, copies=CopyLimits(parts=4, most=2), cache_prefixes=True)
    scheduler, runner = Scheduler(3, 64, policy), FakeRunner()
    cached, beside = make_sequence(PROMPT, 4), make_sequence([9], 4)
    scheduler.submit([cached])
    step = scheduler.plan(0.0)
    assert step is not None
    scheduler.commit(step, runner.run(step.plan), 0.0)
    scheduler.submit([beside])
    step = scheduler.plan(0.0)
    assert step is not None
    assert (step.sequences, cached.slot) == ([beside], step.plan.copies[0].target)
    updates = scheduler.fail(step, GenerationFailed("broken"))
    check_invariants(scheduler)
    assert [sequence for sequence, _ in updates] == [beside]
    run(scheduler, runner)
    assert cached.generated == expected_tokens(PROMPT, 4)


def test_a_time_slice_does_not_pass_while_its_sequence_waits_for_copies() -> None:
    """Else two that take turns at one slot would be exchanged after each token, as an exchange takes longer than a
    slice."""
    limits = CopyLimits(parts=8, most=1)
    scheduler, runner = Scheduler(1, 64, Policy(host_slots=3, copies=limits, max_running=3, time_slice=4)), FakeRunner()
    sequences = [make_sequence([number] * 8, 12) for number in range(2)]
    scheduler.submit(sequences)
    steps = 0
    while scheduler.has_work and steps < 2_000:
        step = scheduler.plan(0.0)
        assert step is not None
        scheduler.commit(step, runner.run(step.plan), 0.0)
        check_invariants(scheduler)
        steps += 1
    assert [sequence.generated for sequence in sequences] == [expected_tokens([*s.prompt], 12) for s in sequences]
    assert 0 < runner.copies <= 2 * (2 * 12 // 4)  # at each exchange one state goes, and one comes
