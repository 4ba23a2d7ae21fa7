from __future__ import annotations

from bdh_batch.errors import GenerationFailed
from bdh_batch.messages import FinishReason
from bdh_batch.scheduler.scheduler import Scheduler, Step
from tests.scheduler.fakes import FakeRunner, FakeText, expected_tokens, make_sequence

BROKEN = GenerationFailed("broken")


def step(scheduler: Scheduler, runner: FakeRunner) -> Step | None:
    planned = scheduler.plan(now=0.0)
    if planned is not None:
        scheduler.commit(planned, runner.run(planned.plan), now=0.0)
    scheduler.check()
    return planned


def run_dry(scheduler: Scheduler, runner: FakeRunner) -> None:
    while scheduler.has_work:
        assert step(scheduler, runner) is not None


def test_a_newcomer_joins_the_next_step_of_those_that_run() -> None:
    scheduler, runner = Scheduler(slots=40, prefill_tokens=64), FakeRunner()
    scheduler.submit(make_sequence([1, 2], 500) for _ in range(32))
    for _ in range(5):
        step(scheduler, runner)
    newcomer = make_sequence([3] * 60, 10)
    scheduler.submit([newcomer])
    planned = step(scheduler, runner)
    assert planned is not None
    assert len(planned.sequences) == 33
    assert len(newcomer.generated) == 1


def test_decoders_go_in_every_step_whatever_is_prefilled() -> None:
    scheduler, runner = Scheduler(slots=8, prefill_tokens=16), FakeRunner()
    decoders = [make_sequence([1], 100) for _ in range(4)]
    scheduler.submit(decoders)
    step(scheduler, runner)
    scheduler.submit([make_sequence([2] * 1000, 1) for _ in range(4)])
    for count in range(2, 40):
        planned = step(scheduler, runner)
        assert planned is not None
        assert planned.plan.tokens <= 4 + 16
        assert all(len(decoder.generated) == count for decoder in decoders)


def test_a_short_prompt_is_not_held_up_by_a_long_one() -> None:
    scheduler, runner = Scheduler(slots=8, prefill_tokens=32), FakeRunner()
    scheduler.submit([make_sequence([2] * 10_000, 1)])
    step(scheduler, runner)
    short = make_sequence([1] * 16, 1)
    scheduler.submit([short])
    step(scheduler, runner)
    assert short.finish_reason is FinishReason.LENGTH


def test_a_newcomer_among_prompts_under_way_has_its_first_token_within_five_steps() -> None:
    scheduler, runner = Scheduler(slots=80, prefill_tokens=256), FakeRunner()
    scheduler.submit(make_sequence([2] * 40_000, 100) for _ in range(32))
    scheduler.submit(make_sequence([1], 10_000) for _ in range(32))
    for _ in range(3):
        step(scheduler, runner)
    for length in (1, 12, 200, 1000):
        newcomer = make_sequence([3] * length, 1)
        scheduler.submit([newcomer])
        for _ in range(5):
            step(scheduler, runner)
        assert newcomer.finish_reason is FinishReason.LENGTH


def test_more_prompts_than_budget_all_get_through() -> None:
    scheduler, runner = Scheduler(slots=20, prefill_tokens=4), FakeRunner()
    sequences = [make_sequence([1] * (2 + length), 3) for length in range(20)]
    scheduler.submit(sequences)
    run_dry(scheduler, runner)
    assert all(sequence.generated == expected_tokens(list(sequence.prompt), 3) for sequence in sequences)


def test_waiting_ones_get_slots_first_come_first_served() -> None:
    scheduler, runner = Scheduler(slots=2, prefill_tokens=64), FakeRunner()
    sequences = [make_sequence([1, 2], 1, name=str(place)) for place in range(9)]
    scheduler.submit(sequences)
    order = []
    while scheduler.has_work:
        planned = step(scheduler, runner)
        assert planned is not None
        order += sorted(sequence.id for sequence in planned.sequences)
    assert order == [str(place) for place in range(9)]


def test_a_failed_step_ends_only_its_own_sequences() -> None:
    scheduler, runner = Scheduler(slots=2, prefill_tokens=64), FakeRunner()
    lost, waiting = [make_sequence([1], 5), make_sequence([2], 5)], make_sequence([3], 5)
    scheduler.submit([*lost, waiting])
    planned = scheduler.plan(now=0.0)
    assert planned is not None
    updates = scheduler.fail(planned, BROKEN)
    scheduler.check()
    assert [delta.error for _, delta in updates] == [BROKEN] * 2
    run_dry(scheduler, runner)
    assert waiting.generated == expected_tokens([3], 5)


def test_a_fault_in_one_text_ends_that_request_alone() -> None:
    scheduler, runner = Scheduler(slots=2, prefill_tokens=64), FakeRunner()
    bad, good = make_sequence([1], 9, FakeText(fail_after=3)), make_sequence([2], 9)
    scheduler.submit([bad, good])
    run_dry(scheduler, runner)
    assert bad.finish_reason is FinishReason.ERROR
    assert good.generated == expected_tokens([2], 9)
