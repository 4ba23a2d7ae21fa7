from __future__ import annotations

import weakref

from bdh_batch.errors import GenerationFailed, QueueTimeout, RunTimeout
from bdh_batch.messages import FinishReason
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from tests.scheduler.fakes import FakeRunner, FakeText, expected_tokens, make_sequence

BROKEN = GenerationFailed("broken")


def step(scheduler: Scheduler, runner: FakeRunner, now: float = 0.0) -> Step | None:
    planned = scheduler.plan(now)
    if planned is not None:
        scheduler.commit(planned, runner.run(planned.plan), now)
    check_invariants(scheduler)
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


def test_prompts_under_way_take_their_tokens_in_few_pieces() -> None:
    scheduler, runner = Scheduler(slots=40, prefill_tokens=256), FakeRunner()
    scheduler.submit(make_sequence([number] * 1000, 1) for number in range(32))
    while scheduler.has_work:
        planned = step(scheduler, runner)
        assert planned is not None
        assert sum(len(segment.tokens) > 0 for segment in planned.plan.segments) <= 4


def test_long_prompts_are_not_overtaken_by_short_ones_for_ever() -> None:
    """On a machine where a prompt token costs 1 ms, and short prompts alone would fill every step."""
    scheduler, runner, now = Scheduler(400, 128, Policy(target_step=0.128)), FakeRunner(), 0.0
    long = [make_sequence([100 + number] * 1000, 1) for number in range(10)]
    scheduler.submit(long)
    for number in range(300):
        short = make_sequence([number % 100, *[number] * 127], 1)
        short.times.arrived = now
        scheduler.submit([short])
        planned = scheduler.plan(now)
        assert planned is not None
        now += 0.001 * planned.prefill_tokens
        scheduler.commit(planned, runner.run(planned.plan), now)
    assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in long)


def test_more_prompts_than_budget_all_get_through() -> None:
    scheduler, runner = Scheduler(slots=20, prefill_tokens=4), FakeRunner()
    sequences = [make_sequence([1] * (2 + length), 3) for length in range(20)]
    scheduler.submit(sequences)
    run_dry(scheduler, runner)
    assert all(sequence.generated == expected_tokens(list(sequence.prompt), 3) for sequence in sequences)


def test_waiting_ones_get_slots_first_come_first_served() -> None:
    scheduler, runner = Scheduler(slots=2, prefill_tokens=64), FakeRunner()
    sequences = [make_sequence([1, 2], 1, name=str(index)) for index in range(9)]
    scheduler.submit(sequences)
    order = []
    while scheduler.has_work:
        planned = step(scheduler, runner)
        assert planned is not None
        order += sorted(sequence.id for sequence in planned.sequences)
    assert order == [str(index) for index in range(9)]


def test_a_failed_step_ends_only_its_own_sequences() -> None:
    scheduler, runner = Scheduler(slots=2, prefill_tokens=64), FakeRunner()
    lost, waiting = [make_sequence([1], 5), make_sequence([2], 5)], make_sequence([3], 5)
    scheduler.submit([*lost, waiting])
    planned = scheduler.plan(now=0.0)
    assert planned is not None
    updates = scheduler.fail(planned, BROKEN)
    check_invariants(scheduler)
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


class TestTurns:
    def test_a_tenant_with_one_request_is_served_within_a_time_slice(self) -> None:
        scheduler, runner = Scheduler(4, 64, Policy(host_slots=4, time_slice=8)), FakeRunner()
        scheduler.submit(make_sequence([1, 2], 10_000, tenant="flood") for _ in range(100))
        for _ in range(20):
            step(scheduler, runner)
        drop = make_sequence([3], 5, tenant="drop")
        scheduler.submit([drop])
        for _ in range(8):
            step(scheduler, runner)
        assert drop.finish_reason is FinishReason.LENGTH

    def test_slots_go_by_weight(self) -> None:
        policy = Policy(host_slots=12, time_slice=4, weights={"heavy": 3.0})
        scheduler, runner = Scheduler(8, 64, policy), FakeRunner()
        heavy, light = ([make_sequence([1], 10, tenant=tenant) for _ in range(300)] for tenant in ("heavy", "light"))
        scheduler.submit([*light, *heavy])
        for _ in range(200):
            step(scheduler, runner)
        done = [sum(len(s.generated) for s in sequences) for sequences in (heavy, light)]
        assert 2.5 < done[0] / done[1] < 3.5

    def test_more_streams_than_slots_advance_alike(self) -> None:
        scheduler, runner = Scheduler(3, 64, Policy(host_slots=8, max_running=9, time_slice=4)), FakeRunner()
        streams = [make_sequence([number], 10_000) for number in range(9)]
        scheduler.submit(streams)
        for number in range(300):
            step(scheduler, runner, now=0.01 * number)
        counts = [len(stream.generated) for stream in streams]
        assert sum(counts) == 900
        assert max(counts) - min(counts) <= 3 * 4

    def test_a_higher_priority_takes_a_slot_at_once(self) -> None:
        scheduler, runner = Scheduler(2, 64, Policy(host_slots=2)), FakeRunner()
        low = [make_sequence([1], 50, priority=3) for _ in range(2)]
        scheduler.submit(low)
        step(scheduler, runner)
        high = make_sequence([2], 4, priority=-1)
        scheduler.submit([high])
        for _ in range(4):
            step(scheduler, runner)
        assert high.finish_reason is FinishReason.LENGTH
        assert scheduler.counts.preemptions == 1
        run_dry(scheduler, runner)
        assert all(sequence.generated == expected_tokens([1], 50) for sequence in low)


class TestSharing:
    CACHING = Policy(cache_prefixes=True, min_shared=4)

    def test_a_common_prefix_is_computed_once(self) -> None:
        scheduler, runner = Scheduler(8, 1000, Policy(min_shared=4)), FakeRunner()
        stem = list(range(100))
        scheduler.submit(make_sequence([*stem, 200, number, 7], 1) for number in range(8))
        run_dry(scheduler, runner)
        assert runner.computed == 101 + 8 * 2  # they part at the digit
        assert len(scheduler.sharing.cache) == 0

    def test_equal_prompts_compute_their_last_token_each(self) -> None:
        scheduler, runner = Scheduler(3, 1000, Policy(min_shared=4)), FakeRunner()
        sequences = [make_sequence([5] * 50, 1) for _ in range(10)]
        scheduler.submit(sequences)
        run_dry(scheduler, runner)
        assert runner.computed == 49 + 10

    def test_a_state_that_is_cached_stays_and_all_that_go_on_from_it_begin_in_copies(self) -> None:
        """Their own step reads them, so the kernels can make them; that of who computed it, too."""
        scheduler, runner = Scheduler(5, 1000, self.CACHING), FakeRunner()
        sequences = [make_sequence([5] * 40, 3) for _ in range(3)]
        scheduler.submit(sequences)
        computed, forked = step(scheduler, runner), step(scheduler, runner)
        assert computed is not None
        assert forked is not None
        (entry,) = scheduler.sharing.cache
        assert [segment.slot for segment in computed.plan.segments] == [entry.slot]
        assert {copy.source for copy in forked.plan.copies} == {entry.slot}
        assert {copy.target for copy in forked.plan.copies} == {segment.slot for segment in forked.plan.segments}
        run_dry(scheduler, runner)
        assert [sequence.generated for sequence in sequences] == [expected_tokens([5] * 40, 3)] * 3

    def test_another_one_does_not_wait_for_a_state_that_is_awaited(self) -> None:
        for host_slots in (0, 1, 2):
            scheduler, runner = (
                Scheduler(2, 1000, Policy(host_slots=host_slots, min_shared=4, time_slice=8)),
                FakeRunner(),
            )
            forks = [make_sequence([5] * 40, 1000) for _ in range(3)]
            scheduler.submit(forks)
            step(scheduler, runner)
            other = make_sequence([6], 3, priority=-1)
            scheduler.submit([other])
            for _ in range(20):
                step(scheduler, runner)
            assert other.finish_reason is FinishReason.LENGTH
            assert sum(bool(fork.generated) for fork in forks) >= 2  # no slot is idle while someone waits

    def test_a_third_prompt_begins_where_two_others_parted(self) -> None:
        scheduler, runner = Scheduler(8, 1000, self.CACHING), FakeRunner()
        prompts = [[*range(60), number, 9, 9] for number in range(100, 103)]
        cached = []
        for prompt in prompts:
            sequence = make_sequence(prompt, 2)
            scheduler.submit([sequence])
            run_dry(scheduler, runner)
            cached.append(sequence.prefix.cached)
        assert cached == [0, 0, 60]

    def test_the_next_turn_begins_at_the_end_of_the_completion(self) -> None:
        scheduler, runner = Scheduler(8, 1000, self.CACHING), FakeRunner()
        first = make_sequence([1] * 20, 10)
        scheduler.submit([first])
        run_dry(scheduler, runner)
        second = make_sequence([*first.prompt, *first.generated, 4, 5], 3)
        scheduler.submit([second])
        run_dry(scheduler, runner)
        assert second.prefix.cached == 29
        assert second.generated == expected_tokens(list(second.prompt), 3)

    def test_who_waits_for_one_that_leaves_goes_on_alone(self) -> None:
        scheduler, runner = Scheduler(4, 10, Policy(min_shared=4)), FakeRunner()
        producer, waiter = make_sequence([5] * 50, 4), make_sequence([5] * 50, 4)
        scheduler.submit([producer, waiter])
        step(scheduler, runner)
        assert (len(scheduler.running), len(scheduler.stages.backlog)) == (1, 1)
        scheduler.abort([producer])
        run_dry(scheduler, runner)
        assert waiter.generated == expected_tokens([5] * 50, 4)

    def test_running_sequences_come_before_what_is_cached(self) -> None:
        scheduler, runner = Scheduler(4, 1000, self.CACHING), FakeRunner()
        for number in range(10):
            scheduler.submit([make_sequence([number] * 30, 3)])
            run_dry(scheduler, runner)
        assert len(scheduler.sharing.cache) == 4
        scheduler.submit(make_sequence([50 + number], 5) for number in range(4))
        planned = step(scheduler, runner)
        assert planned is not None
        assert len(planned.sequences) == 4


def test_more_than_fit_the_time_of_a_step_decode_by_turns() -> None:
    scheduler, runner, now = Scheduler(300, 64, Policy(target_step=0.02)), FakeRunner(), 0.0
    streams = [make_sequence([number % 251, 1 + number // 251], 10_000) for number in range(250)]
    scheduler.submit(streams)
    seconds = []
    for _ in range(400):
        planned = scheduler.plan(now)
        assert planned is not None
        seconds.append(0.001 + 0.0002 * planned.decodes + 0.0001 * planned.prefill_tokens)
        now += seconds[-1]
        scheduler.commit(planned, runner.run(planned.plan), now)
    assert max(seconds[-100:]) <= 0.021
    counts = [len(stream.generated) for stream in streams]
    assert max(counts[:60]) - min(counts[:60]) <= 2  # those that began together


def test_the_first_token_of_another_tenant_does_not_wait_for_a_flood_to_decode() -> None:
    """A step costs 1 ms, a stream 0.2 ms, a prompt token 0.1 ms."""
    scheduler, runner, now = Scheduler(64, 256, Policy(target_step=0.02)), FakeRunner(), 0.0

    def advance() -> Step:
        nonlocal now
        planned = scheduler.plan(now)
        assert planned is not None
        now += 0.001 + 0.0002 * planned.decodes + 0.0001 * planned.prefill_tokens
        scheduler.commit(planned, runner.run(planned.plan), now)
        return planned

    flood = [make_sequence([number] * (1 + number % 7 * 9), 10_000, tenant="flood") for number in range(60)]
    for stream in flood:
        scheduler.submit([stream])
        advance()
    for _ in range(3):
        drop = make_sequence([1] * 200, 2, tenant="drop")
        scheduler.submit([drop])
        planned = advance()
        assert planned.sequences == [drop]
        assert drop.generated
        planned = advance()
        assert len(planned.sequences) == 61, "streams are never passed over twice on end"
        advance()  # by now the flood has been served more
    assert all(stream.generated == expected_tokens(list(stream.prompt), len(stream.generated)) for stream in flood)


def test_a_step_keeps_to_its_time() -> None:
    """On a machine where a sequence costs 0.1 ms, a prompt token 0.2 ms, and a step 1 ms."""
    scheduler, runner, now = Scheduler(16, 4000, Policy(target_step=0.02)), FakeRunner(), 0.0
    scheduler.submit(make_sequence([1], 10_000) for _ in range(10))
    seconds = []
    for number in range(150):
        if number in (20, 40):
            scheduler.submit([make_sequence([2] * (4000 + number), 1)])
        planned = scheduler.plan(now)
        assert planned is not None
        seconds.append(0.001 + 0.0001 * planned.decodes + 0.0002 * planned.prefill_tokens)
        now += seconds[-1]
        scheduler.commit(planned, runner.run(planned.plan), now)
    late = [took for took in seconds[42:] if took > 0.0021]  # those with a part of the second prompt
    assert max(late) <= 0.0205
    assert sum(late[:-1]) / len(late[:-1]) > 0.018


def test_running_out_of_memory_makes_steps_smaller_and_loses_nobody() -> None:
    scheduler, runner = Scheduler(4, 64), FakeRunner()
    sequences = [make_sequence([number] * 12, 5) for number in range(4)]
    scheduler.submit(sequences)
    sizes = []
    for _ in range(3):
        planned = scheduler.plan(0.0)
        assert planned is not None
        sizes.append(planned.prefill_tokens)
        runner.slots = {slot: [-1] for slot in range(4)}
        assert scheduler.out_of_memory(planned) == []
        check_invariants(scheduler)
    assert sizes == [48, 32, 16]
    assert (scheduler.size.prefill, scheduler.size.width) == (16, 1)
    run_dry(scheduler, runner)
    assert all(sequence.generated == expected_tokens(list(sequence.prompt), 5) for sequence in sequences)


def test_small_requests_on_end_get_their_share_and_no_more() -> None:
    """A step costs 1 ms, a sequence 0.2 ms, a prompt token 0.1 ms."""
    scheduler, runner, now = Scheduler(80, 256, Policy(target_step=0.025)), FakeRunner(), 0.0
    flood = [make_sequence([number], 10_000, tenant="flood") for number in range(64)]
    scheduler.submit(flood)
    small = make_sequence([1] * 256, 1, tenant="small")
    for _ in range(1000):
        if small.finish_reason is not None:
            small = make_sequence([1] * 256, 1, tenant="small")
        if not small.standing.arrival:
            scheduler.submit([small])
        planned = scheduler.plan(now)
        assert planned is not None
        now += 0.001 + 0.0002 * planned.decodes + 0.0001 * planned.prefill_tokens
        scheduler.commit(planned, runner.run(planned.plan), now)
    assert small.standing.account.virtual_time < 1.5 * flood[0].standing.account.virtual_time


def test_prompts_of_a_class_do_not_throw_one_another_out() -> None:
    """One slot on the device, four beside it, and more that want one than there are."""
    policy = Policy(host_slots=4, max_running=5, time_slice=1, cache_prefixes=True, share_all=True, min_shared=8)
    scheduler, runner = Scheduler(1, 3, policy), FakeRunner()
    later = [make_sequence([0] * 12, 5, priority=1) for _ in range(6)]
    scheduler.submit(later)
    for _ in range(21):
        step(scheduler, runner)
    scheduler.abort(later[5:])
    step(scheduler, runner)
    step(scheduler, runner)
    stem = [7 * at % 251 for at in range(20)]
    first = [make_sequence(list(prompt), 5) for prompt in ([0] * 10, [*stem, 0, 0]) for _ in range(2)]
    scheduler.submit(first)
    for _ in range(200):
        step(scheduler, runner)
    assert all(sequence.finish_reason is not None for sequence in (*first, *later))


def test_time_that_is_up_ends_who_waits_and_who_runs() -> None:
    scheduler, runner = Scheduler(1, 64), FakeRunner()
    running = make_sequence([1], 100, deadline=10.0, queue_deadline=1.0)
    waiting = make_sequence([2], 100, queue_deadline=5.0)
    scheduler.submit([running, waiting])
    step(scheduler, runner)
    assert scheduler.expire(4.9) == []
    ((first, delta),) = scheduler.expire(5.0)
    assert (first, type(delta.error)) == (waiting, QueueTimeout)
    ((second, delta),) = scheduler.expire(11.0)
    assert (second, type(delta.error)) == (running, RunTimeout)
    check_invariants(scheduler)
    assert not scheduler.has_work


def test_who_ended_before_its_time_is_not_held_until_then() -> None:
    scheduler, runner = Scheduler(1, 64), FakeRunner()
    early = make_sequence([1], 1, deadline=10.0)
    gone = weakref.ref(early.client.outbox)
    scheduler.submit([early])
    step(scheduler, runner)
    assert early.finish_reason == "length"
    del early
    scheduler.submit([make_sequence([2], 1)])  # the last step's are let go with the next one
    assert scheduler.expire(1.0) == []
    step(scheduler, runner)
    assert gone() is None
