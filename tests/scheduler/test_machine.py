"""Anything that can happen to a scheduler, in any order, over a runner whose states are the tokens themselves."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from bdh_batch.errors import GenerationFailed
from bdh_batch.messages import LATENT_FROZEN, FinishReason, NeuronsAsked, SavedState
from bdh_batch.scheduler.backlog import NO_UNIT
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.copies import CopyLimits, Save
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.prefix_cache import digests_at
from bdh_batch.scheduler.prefixes import pack
from bdh_batch.scheduler.scheduler import Scheduler, Update
from bdh_batch.scheduler.sequence import WAITING, Sequence, Stage
from bdh_batch.scheduler.transfers import Load
from tests.scheduler.fakes import FakeRunner, FakeText, expected_tokens, make_sequence

BROKEN = GenerationFailed("broken")
STEM = [7 * at % 251 for at in range(40)]  # most prompts begin as this does, some longer, some shorter

prompts = st.builds(
    lambda stem, first, rest: [*STEM[:stem], first, *rest],
    st.sampled_from([0, 0, 3, 8, 9, 20, 40]),
    st.integers(0, 3),
    st.lists(st.integers(LATENT_FROZEN, 3), max_size=11),
)
policies = st.builds(
    Policy,
    host_slots=st.integers(0, 4),
    swaps=st.booleans(),
    transfer_slots=st.integers(1, 4),
    copies=st.builds(CopyLimits, st.integers(1, 3), st.none() | st.integers(1, 4), st.integers(1, 3)),
    max_running=st.none() | st.integers(1, 9),
    time_slice=st.integers(1, 6),
    target_step=st.sampled_from([0.0, 0.01]),
    cache_prefixes=st.booleans(),
    share_all=st.booleans(),
    min_shared=st.integers(1, 10),
    weights=st.just({"b": 3.0}),
    free_slots=st.none() | st.integers(1, 5),
    idle_release=st.sampled_from([0.0, 1.0, 5.0]),
    idle_kept=st.integers(0, 2),
    patience=st.sampled_from([inf, 2.0, 5.0, 20.0]),
    queue_unit=st.sampled_from([4, NO_UNIT]),
    most_watched=st.integers(2, 9),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Nothing is lost, doubled or leaked, every state is what it should be, and every request ends once."""

    sequences = Bundle("sequences")

    @initialize(slots=st.integers(1, 5), prefill_tokens=st.integers(1, 20), policy=policies)
    def begin(self, slots: int, prefill_tokens: int, policy: Policy) -> None:
        self.scheduler = Scheduler(slots, prefill_tokens, policy)
        self.runner = FakeRunner()
        self.now = 0.0
        self.submitted: list[Sequence] = []
        self.shown: dict[Sequence, list[int]] = {}
        self.neurons: dict[Sequence, list[tuple[int, int]]] = {}  # of tokens, with their positions
        self.ends: dict[Sequence, list[FinishReason]] = {}
        self.passed_over: Counter[str] = Counter()  # plans on end, by tenant
        self.outranked: Counter[Sequence] = Counter()  # plans on end
        self.debts: dict[Sequence, float] = {}  # the largest in these plans, in tokens
        self.waiting: set[Sequence] = set()  # by what the scheduler says of changes
        self.loads: list[Load] = []  # that are read
        self.saves: list[Save] = []  # that are written
        self.saved: Counter[Sequence] = Counter()

    def take(self, updates: list[Update]) -> None:
        for sequence, delta in updates:
            if delta.saved is not None or delta.save_error is not None:
                assert sequence.save_to is not None
                self.saved[sequence] += 1
                if delta.finish_reason is None:
                    assert self.ends[sequence], "what has not ended is not saved"
                    continue
            assert not self.ends[sequence], "nothing comes after the end"
            self.shown[sequence] += delta.tokens
            self.neurons[sequence] += [(each.token, each.per_head) for each in delta.neurons or ()]
            if sequence.watches and not sequence.completion.needs_all:
                assert len(delta.tokens) == len(delta.neurons or ()), "each token comes with its neurons"
            if delta.finish_reason is not None:
                self.ends[sequence].append(delta.finish_reason)

    def run_plan(self, step: Step) -> None:
        """Computes `step`, after a look at the states that it builds on."""
        watched = sum(len(segment.tokens) - segment.watch_from for segment in step.plan.segments if segment.watch)
        assert watched <= self.scheduler.policy.most_watched, "no step shows more than it has time for"
        states = dict(self.runner.slots)
        for copy in step.plan.copies:
            states[copy.target] = states[copy.source] if copy.end == copy.parts else [-1]
            if copy.moves:
                states[copy.source] = [-1]
        for slot in step.plan.releases:
            states.pop(slot, None)
        for sequence, segment in zip(step.sequences, step.plan.segments, strict=True):
            held = states[segment.slot] if segment.start else []
            assert held == list(sequence.known(0, segment.start)), "a state is that of the tokens before"
            assert list(segment.tokens) == list(sequence.known(segment.start, segment.start + len(segment.tokens)))
        self.take(self.scheduler.commit(step, self.runner.run(step.plan), self.now))
        for save in step.saves:
            assert self.runner.slots[save.slot] == save.sequence.known(0, save.state.tokens)
        self.saves += step.saves
        for entry in self.scheduler.sharing.cache:
            if entry.slot in self.scheduler.allocator.copies.busy:
                continue
            cached = self.runner.slots[entry.slot]
            assert (len(cached), digests_at(pack(cached), [len(cached)])) == (entry.length, [entry.digest])

    @rule(
        target=sequences,
        prompts=st.lists(prompts, max_size=4),
        copies=st.integers(1, 3),
        options=st.fixed_dictionaries(
            {
                "max_tokens": st.integers(1, 12),
                "tenant": st.sampled_from("ab"),
                "priority": st.sampled_from([0, 0, 0, 1, -1]),
                "watches": st.sampled_from([None, None, NeuronsAsked(1), NeuronsAsked(2, prompt=True)]),
            }
        ),
        files=st.tuples(st.none() | st.integers(1, 30), st.booleans(), st.booleans()),
        stop_after=st.none() | st.integers(1, 6),
        patience=st.tuples(st.none() | st.integers(1, 40), st.none() | st.integers(1, 80)),
    )
    def submit(
        self,
        prompts: list[list[int]],
        copies: int,
        options: dict[str, Any],
        stop_after: int | None,
        patience: tuple[int | None, int | None],
        files: tuple[int | None, bool, bool] = (None, False, False),
    ) -> Any:
        queue, total = (None if seconds is None else self.now + seconds for seconds in patience)
        sequences = [
            make_sequence(prompt, text=FakeText(stop_after), queue_deadline=queue, deadline=total, **options)
            for prompt in prompts
            for _ in range(copies)
        ]
        self.submitted += sequences
        for sequence in sequences:
            self.shown[sequence], self.neurons[sequence], self.ends[sequence] = [], [], []
            tokens, sequence.state_optional, saves = files
            may_begin = tokens is not None and tokens < len(sequence.prompt) and not sequence.completion.needs_all
            sequence.state = SavedState("", tokens) if may_begin and tokens is not None else None
            sequence.save_to = "" if saves else None
            sequence.times.arrived = self.now
        self.scheduler.submit(sequences)
        return multiple(*sequences)

    @rule(sequence=sequences)
    def abort(self, sequence: Sequence) -> None:
        self.take(self.scheduler.abort([sequence]))
        assert self.ends[sequence]

    @rule()
    def advance(self) -> None:
        self.now += 1.0
        self.take(self.scheduler.expire(self.now))
        had_work = self.scheduler.has_work
        step = self.scheduler.plan(self.now)
        computes = step is not None and bool(step.plan.segments or step.plan.copies)
        if not any(sequence.stage is Stage.AWAITING_STATE for sequence in self.submitted):
            assert computes or not self.scheduler.has_work, "work is never stuck"
        assert had_work or not computes
        self.watch_waiting()
        self.watch_priorities(step)
        self.loads += self.scheduler.transfers.take_loads()
        if step is not None:
            self.run_plan(step)
        self.settle()

    @precondition(lambda self: self.loads)
    @rule(fails=st.booleans(), at=st.integers(0, 3))
    def read(self, fails: bool, at: int) -> None:
        """A state has been read, or could not be."""
        load = self.loads.pop(at % len(self.loads))
        if fails:
            self.take(self.scheduler.loaded(load, "broken"))
        else:
            self.runner.slots[load.slot] = array("i", load.tokens).tolist()
            self.take(self.scheduler.loaded(load, None))

    @precondition(lambda self: self.saves)
    @rule(fails=st.booleans(), at=st.integers(0, 3))
    def write(self, fails: bool, at: int) -> None:
        """A state has been written, or could not be."""
        save = self.saves.pop(at % len(self.saves))
        self.take(self.scheduler.files.saved(save, "broken" if fails else None))

    def transfer_all(self) -> None:
        while self.loads:
            self.read(False, 0)
        while self.saves:
            self.write(False, 0)
        self.settle()

    def settle(self) -> None:
        transfers = self.scheduler.transfers
        transfers.give(transfers.take_left(), self.now)

    def plans(self) -> int:
        """How many it may take until a token is computed: for each, a state may have to go, and another one to come."""
        limits = self.scheduler.policy.copies
        return 1 + (0 if limits.most is None else 2 * -(-limits.parts * limits.rounded // limits.most))

    def watch_waiting(self) -> None:
        """A tenant of the first priority that had least and holds nothing gets some soon, whatever others queue."""
        alive = [sequence for sequence in self.submitted if sequence.finish_reason is None]
        first = min((sequence.priority for sequence in alive), default=0)
        least = min((sequence.standing.account.virtual_time for sequence in alive), default=0.0)
        for tenant in "ab":
            mine = [sequence for sequence in alive if sequence.tenant == tenant]
            queued = any(s.priority == first and s.standing.account.virtual_time <= least for s in mine)
            served = any(s.stage is not Stage.QUEUED or s.times.scheduled is not None for s in mine)
            self.passed_over[tenant] = self.passed_over[tenant] + 1 if queued and not served else 0
            known = sum(
                len(s.prompt) + len(s.generated) for s in alive if s.tenant != tenant and s.times.scheduled is not None
            )
            bound = 3 + self.plans() * (self.scheduler.policy.time_slice + 2 * known)
            assert self.passed_over[tenant] <= bound, "no tenant is starved"

    def watch_priorities(self, step: Step | None) -> None:
        """Nobody goes without for longer than its patience because of its priority: from then on, its tenant has a part
        of the steps that those of earlier priorities have, however many of them there are."""
        alive = [sequence for sequence in self.submitted if sequence.finish_reason is None]
        served = set() if step is None else set(step.sequences)
        for sequence in alive:
            earlier = any(other.priority < sequence.priority for other in served)
            mine = any(other.tenant == sequence.tenant for other in served)
            aged = self.now - sequence.standing.served_at > self.scheduler.policy.patience
            passed_over = aged and earlier and not mine and sequence.stage is not Stage.AWAITING_PREFIX
            self.outranked[sequence] = self.outranked[sequence] + 1 if passed_over else 0
            others = [other for other in alive if other.tenant != sequence.tenant]
            # Inside a priority, a tenant that was served less goes first: for as many tokens as it lacks, by weight.
            used, account = sequence.standing.account.virtual_time, [other.standing.account for other in others]
            debt = max((max(0.0, used - other.virtual_time) * other.weight for other in account), default=0.0)
            known = sum(
                len(other.prompt) + len(other.generated) for other in others if other.times.scheduled is not None
            )
            # It shrinks while the others catch up.
            self.debts[sequence] = debt = max(debt, self.debts.get(sequence, 0.0)) if passed_over else 0.0
            bound = 3 + self.plans() * (self.scheduler.policy.time_slice + 2 * known + debt)
            assert self.outranked[sequence] <= bound, "no priority starves"

    @rule(
        count=st.integers(0, 3),
        tokens=st.integers(0, 20),
        queue=st.tuples(st.integers(-1, 1), st.sampled_from("ab")),
    )
    def shed(self, count: int, tokens: int, queue: tuple[int, str]) -> None:
        before = len(self.scheduler.stages.backlog)
        shed = self.scheduler.shed(count, tokens, queue, BROKEN)
        self.take(shed)
        freed = sum(len(sequence.prompt) for sequence, _ in shed)
        assert len(shed) == before or (len(shed) >= count and freed >= tokens)

    @rule()
    def fail_step(self) -> None:
        step = self.scheduler.plan(self.now)
        if step is not None:
            self.spoil(step)
            updates = self.scheduler.fail(step, BROKEN)
            ended = {sequence for sequence, delta in updates if delta.finish_reason is not None}
            assert ended == set(step.sequences), "a failed step ends its own sequences, and no others"
            self.take(updates)

    @rule()
    def run_out_of_memory(self) -> None:
        step = self.scheduler.plan(self.now)
        if step is not None:
            self.spoil(step)
            self.take(self.scheduler.out_of_memory(step))

    def spoil(self, step: Step) -> None:
        """Whatever the step writes holds anything."""
        for slot in [*(copy.target for copy in step.plan.copies), *(segment.slot for segment in step.plan.segments)]:
            self.runner.slots[slot] = [-1]

    @rule()
    def fail_all(self) -> None:
        self.take(self.scheduler.fail_all(BROKEN))
        waits = self.scheduler.transfers.pending or self.scheduler.sharing.pending
        assert self.scheduler.has_work == (waits or len(self.scheduler.allocator.copies) > 0)

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        check_invariants(self.scheduler)
        for sequence, change in self.scheduler.stages.take_changes().items():
            (self.waiting.add if change > 0 else self.waiting.remove)(sequence)
        assert self.waiting == {s for s in self.submitted if s.stage in WAITING and s.standing.arrival}
        assert len(self.scheduler.stages.backlog) == len(self.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        bound = 20 + 3 * sum(len(sequence.prompt) + sequence.completion.max_tokens for sequence in self.submitted)
        for _ in range(bound * self.plans()):
            if not self.scheduler.has_work:
                break
            self.advance()
            self.transfer_all()
        self.transfer_all()
        assert not self.scheduler.has_work, "every request ends within a bounded number of steps"
        for sequence in self.submitted:
            assert len(self.ends[sequence]) == 1, "every request ends exactly once"
            assert self.saved[sequence] == (sequence.save_to is not None), "what became of each state is said once"
            self.check_shown(sequence, self.ends[sequence][0])
            assert sequence.generated == expected_tokens(list(sequence.prompt), len(sequence.generated))
        transfers = self.scheduler.transfers
        assert transfers._slots.free_count == transfers.count, "all memory for files is free"
        assert (transfers.to_come, transfers._loads, transfers._load_of) == (0, {}, {})

    def check_shown(self, sequence: Sequence, end: FinishReason) -> None:
        """All that was generated was shown; but for a token whose neurons were still to come when it was cut short."""
        shown, complete = self.shown[sequence], end in (FinishReason.STOP, FinishReason.LENGTH)
        held = len(sequence.generated) - len(shown)
        assert shown == sequence.generated[: len(shown)]
        assert held <= (sequence.watches and not complete)
        begin = 0 if sequence.completion.needs_all else len(sequence.prompt)
        read = [*enumerate([*sequence.prompt, *shown])][begin:] if sequence.watches and (shown or complete) else []
        assert self.neurons[sequence] == [(token, at) for at, token in read if token >= 0], "each is shown once"


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("MACHINE_EXAMPLES", 150)), stateful_step_count=40, deadline=None
)
TestScheduler = SchedulerMachine.TestCase


def test_nobody_begins_with_a_copy_that_a_failed_step_did_not_make() -> None:
    """The one that waited for it took its slot over, had none of the step's tokens, and is not believed to hold it."""
    machine = SchedulerMachine()
    machine.begin(3, 10, Policy(time_slice=1, cache_prefixes=False, min_shared=1))
    for stem, tenant in ((20, "b"), (40, "b"), (8, "a")):
        options = {"max_tokens": 1, "tenant": tenant, "priority": 0}
        machine.submit([[*STEM[:stem], 0, 0]], 1, options, None, (None, None))
        if tenant == "b":
            machine.advance()
    machine.fail_step()
    machine.teardown()


@pytest.mark.parametrize("kind", ["queued", "swapped"])
@settings(max_examples=int(os.environ.get("MACHINE_EXAMPLES", 25)), deadline=None)
@given(
    slots=st.integers(1, 4),
    host_slots=st.integers(0, 4),
    time_slice=st.integers(1, 6),
    patience=st.integers(1, 30),
    flooding=st.integers(1, 3),
    prompt=st.integers(1, 30),
    late=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 6), st.booleans()), min_size=1, max_size=4),
)
def test_no_flood_of_an_earlier_class_keeps_another_one_waiting(
    kind: str,
    slots: int,
    host_slots: int,
    time_slice: int,
    patience: int,
    flooding: int,
    prompt: int,
    late: list[tuple[int, int, bool]],
) -> None:
    """Tenants with the right to go first, whose requests never end, or others come after. A step takes a second."""
    policy = Policy(host_slots=host_slots, time_slice=time_slice, patience=patience, max_running=slots + host_slots)
    scheduler, runner, now = Scheduler(slots, 16, policy), FakeRunner(), 0.0
    flood: list[Sequence] = []
    others = [
        make_sequence([number + 1] * size, 3, tenant=f"late {number}", priority=priority)
        for number, (priority, size, _) in enumerate(late)
    ]

    def advance() -> None:
        nonlocal now
        now += 1.0
        for number in range(flooding):
            waiting = [s for s in flood if s.stage is Stage.QUEUED and s.tenant == f"first {number}"]
            for _ in range(len(waiting), slots + host_slots + 2):
                endless = 10_000 if number % 2 else 5
                flood.append(make_sequence([7] * prompt, endless, tenant=f"first {number}", priority=-1000))
                flood[-1].times.arrived = now
                scheduler.submit(flood[-1:])
        step = scheduler.plan(now)
        assert step is not None
        scheduler.commit(step, runner.run(step.plan), now)
        flood[:] = [sequence for sequence in flood if sequence.finish_reason is None]

    if kind == "swapped":
        scheduler.submit(others)
        while not all(other.times.scheduled is not None or other.finish_reason for other in others[:slots]):
            step = scheduler.plan(now)
            assert step is not None
            scheduler.commit(step, runner.run(step.plan), now)
    for _ in range(10):
        advance()
    if kind != "swapped":
        for other in others:
            other.times.arrived = now
        scheduler.submit(others)
    tokens = sum(len(other.prompt) + 3 for other in others)
    bound = 3 * len(others) * (patience + 3 * time_slice + 2 * prompt + 10 * flooding) + 10 * tokens
    for _ in range(bound):
        if all(other.finish_reason is not None for other in others):
            break
        advance()
    assert all(other.finish_reason is not None for other in others), "no priority waits for ever"


def test_a_stream_of_a_later_priority_that_no_step_has_room_for_is_scheduled() -> None:
    """A hundred streams of the first priority fill every step's time; a prompt and a stream of a later one run too."""
    scheduler, runner, now = Scheduler(200, 16, Policy(target_step=0.02, patience=5.0)), FakeRunner(), 0.0
    later = make_sequence([1], 10_000, tenant="later", priority=7)
    prompt = make_sequence([2] * 200, 1, tenant="later", priority=7)
    first = [make_sequence([3, number], 10_000, tenant="first") for number in range(100)]
    scheduler.submit([later, *first])
    last, waits = now, []
    for number in range(1500):
        if number == 300:
            prompt.times.arrived = now
            scheduler.submit([prompt])
        scheduler.submit([make_sequence([number % 251] * 16, 1, tenant="first")])
        step = scheduler.plan(now)
        assert step is not None
        now += 0.001 + 0.0003 * step.decodes + 0.0001 * step.prefill_tokens
        scheduler.commit(step, runner.run(step.plan), now)
        if later in step.sequences:
            waits.append(now - last)
            last = now
    assert max(waits) <= 6.0
    assert now - last <= 6.0
    assert prompt.finish_reason is FinishReason.LENGTH


def test_tenants_that_hold_no_more_than_their_share_take_time_slices_in_the_last_slot() -> None:
    """One slot on the device, three beside it. A tenant's stream runs, another's two are swapped, a third tenant comes:
    nobody is above its share but the one that is next."""
    scheduler, runner = Scheduler(1, 16, Policy(host_slots=3, time_slice=1, max_running=4)), FakeRunner()
    streams = [make_sequence([number], 10_000, tenant=tenant) for number, tenant in enumerate("aab")]
    scheduler.submit(streams)
    third = make_sequence([9], 3, tenant="c")
    for number in range(200):
        if number == 20:
            scheduler.submit([third])
        step = scheduler.plan(0.01 * number)
        assert step is not None
        scheduler.commit(step, runner.run(step.plan), 0.01 * number)
    assert third.finish_reason is FinishReason.LENGTH
    assert min(len(stream.generated) for stream in streams) > 40
