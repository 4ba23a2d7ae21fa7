"""The scheduler's parts, each by itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.groups import Groups
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.prefix_cache import Entry, PrefixCache
from bdh_batch.scheduler.prefixes import RECENT, RecentPrompts, common, pack
from bdh_batch.scheduler.rank import rank
from bdh_batch.scheduler.ranking import Ranking
from bdh_batch.scheduler.scheduler import AGE, Scheduler
from bdh_batch.scheduler.sequence import Sequence, Standing
from bdh_batch.scheduler.sharing import Sharing
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.step_size import PATIENCE, StepSize
from bdh_batch.scheduler.tenants import FORGET, Tenant, Tenants
from tests.scheduler.fakes import FakeRunner, make_sequence

TOKENS = st.lists(st.integers(0, 2), max_size=40)


class Waiting:
    """A queue, and the tenants of those that wait in it, as the scheduler has them."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.tenants = Tenants(weights)
        self.queue = Groups()
        self.arrivals = 0

    def submit(self, *sequences: Sequence) -> Waiting:
        for sequence in sequences:
            self.arrivals += 1
            sequence.standing.arrival = self.arrivals
            sequence.standing.account = self.tenants.join(sequence.tenant, sequence.weight)
            sequence.standing.account.count(waiting=1, holding=0)
            self.queue.push(sequence)
        return self

    def take(self) -> Sequence | None:
        """The next one is given a slot."""
        sequence = head(self.queue, min((waiting.priority for waiting in self.queue), default=0))
        if sequence is not None:
            self.queue.remove(sequence)
            sequence.standing.account.count(waiting=-1, holding=1)
        return sequence

    def serve(self) -> str | None:
        """The next one is scheduled, its prompt is computed, and it ends."""
        if (sequence := self.take()) is None:
            return None
        sequence.standing.charge(len(sequence.prompt))
        sequence.standing.account.count(waiting=0, holding=-1)
        return sequence.id

    def served(self) -> list[str]:
        order = []
        while (name := self.serve()) is not None:
            order.append(name)
        assert len(self.queue) == 0
        return order


def head(queue: Groups, first: int) -> Sequence | None:
    """The first in rank, where `first` is the first priority."""
    return min(queue.heads(), key=lambda sequence: rank(sequence, first), default=None)


class TestQueue:
    def test_lower_priorities_go_first_and_inside_a_tenant_who_is_due_first(self) -> None:
        options: list[tuple[str, int, float]] = [("a", 1, 0.0), ("b", 0, 2.0), ("c", 0, 1.0), ("d", 0, 2.0)]
        sequences = [make_sequence([1], 1, name=name, priority=priority) for name, priority, _ in options]
        for sequence, (_, _, due) in zip(sequences, options, strict=True):
            sequence.standing.due = due
        assert Waiting().submit(*sequences).served() == ["c", "b", "d", "a"]

    def test_tenants_take_turns_whatever_they_queue(self) -> None:
        flood = [make_sequence([1], 1, name="f", tenant="f") for _ in range(6)]
        drop = [make_sequence([1], 1, name="d", tenant="d") for _ in range(2)]
        assert Waiting().submit(*flood, *drop).served() == ["f", "d", "f", "d", "f", "f", "f", "f"]

    def test_of_equals_the_tenant_goes_first_that_holds_fewer_slots(self) -> None:
        sequences = [make_sequence([1], 1, name=tenant, tenant=tenant) for tenant in "aaabb"]
        waiting, order = Waiting().submit(*sequences), ""
        while (sequence := waiting.take()) is not None:
            order += sequence.id
        assert order == "ababa"

    def test_weights_are_shares(self) -> None:
        sequences = [make_sequence([1], 1, name=tenant, tenant=tenant) for tenant in "ab" for _ in range(40)]
        order = Waiting({"a": 3.0}).submit(*sequences).served()
        assert 28 <= order[:40].count("a") <= 32

    def test_a_sequence_can_bring_its_weight_and_have_another_share_than_its_tenant(self) -> None:
        sequences = [make_sequence([1], 1, name=name) for name in "ab" for _ in range(40)]
        for sequence in sequences:
            sequence.tenant, sequence.weight = sequence.id, 3.0 if sequence.id == "a" else None
        order = Waiting({"b": 1.0}).submit(*sequences).served()
        assert 28 <= order[:40].count("a") <= 32

    def test_a_pause_saves_nothing_up(self) -> None:
        waiting = Waiting().submit(*(make_sequence([1], 1, name="a", tenant="a") for _ in range(50)))
        for _ in range(40):
            waiting.serve()
        waiting.submit(*(make_sequence([1], 1, name="b", tenant="b") for _ in range(10)))
        assert 4 <= waiting.served()[:10].count("b") <= 6

    def test_one_that_asks_for_less_than_its_share_saves_nothing_up_either(self) -> None:
        """It always has a sequence under way, but nothing that waits."""
        waiting = Waiting().submit(make_sequence([1], 1, name="b", tenant="b"))
        assert waiting.take() is not None
        waiting.submit(*(make_sequence([1], 1, name="a", tenant="a") for _ in range(50)))
        for _ in range(40):
            waiting.serve()
        waiting.submit(*(make_sequence([1], 1, name="b", tenant="b") for _ in range(10)))
        assert 4 <= waiting.served()[:10].count("b") <= 6

    def test_a_tenant_is_charged_once_and_for_what_is_computed(self) -> None:
        standing = Standing(account=Tenant(weight=2.0), charged=10)  # the first ones were cached
        for computed, charged in ((20, 10), (50, 40), (30, 40), (50, 40)):  # in between, its state was lost
            standing.charge(computed)
            assert standing.account.virtual_time == charged / 2

    def test_who_worked_alone_is_in_nobodys_debt(self) -> None:
        waiting = Waiting().submit(make_sequence([1], 1, name="a", tenant="a"))
        waiting.serve()
        waiting.tenants.join("a").charge(0, 5_000)  # what it has generated meanwhile
        waiting.submit(*(make_sequence([1], 1, name="b", tenant="b") for _ in range(20)))
        waiting.submit(make_sequence([1], 1, name="a", tenant="a"))
        assert "a" in waiting.served()[:2]

    def test_one_that_comes_back_has_its_old_rank(self) -> None:
        sequences = [make_sequence([1], 1, name=name) for name in "abc"]
        waiting = Waiting().submit(*sequences)
        waiting.queue.remove(sequences[0])
        waiting.queue.push(sequences[0])
        assert waiting.served() == ["a", "b", "c"]


class Plain:
    """Who is next, by looking at all tenants and all that wait: what `Groups` and `Tenants` say without."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.times: dict[str, float] = {}
        self.active: Counter[str] = Counter()

    def join(self, tenant: str) -> None:
        if not any(sequence.tenant == tenant for sequence in self.waiting):
            others = [self.times[other] for other in +self.active if other != tenant]
            level = min(others) if others else max([0.0, *self.times.values()])
            self.times[tenant] = max(self.times.get(tenant, 0.0), level)
        self.active[tenant] += 1

    def head(self, first: int) -> Sequence | None:
        def rank(sequence: Sequence) -> tuple[int, float, int, float, int]:
            return (
                first if sequence.standing.aged else sequence.priority,
                self.times[sequence.tenant],
                sequence.standing.account.slots,
                sequence.standing.due,
                sequence.standing.arrival,
            )

        return min(self.waiting, key=rank, default=None)


class QueueMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.tenants, self.queue, self.plain = Tenants(), Groups(), Plain()
        self.under_way: list[Sequence] = []
        self.arrivals = 0

    @rule(
        tenant=st.integers(0, 2),
        tokens=st.integers(1, 30),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        alone=st.sampled_from([0.0, 3.0]),
    )
    def push(self, tenant: int, tokens: int, priority: int, alone: float) -> None:
        sequence = make_sequence([1] * tokens, 1, tenant=str(tenant), priority=priority)
        self.arrivals += 1
        sequence.standing.arrival, sequence.standing.due = self.arrivals, self.arrivals + alone
        self.plain.join(sequence.tenant)
        self.plain.waiting.append(sequence)
        sequence.standing.account = self.tenants.join(sequence.tenant)
        sequence.standing.account.count(waiting=1, holding=0)
        self.queue.push(sequence)

    @rule(which=st.integers(0, 99))
    def age(self, which: int) -> None:
        if self.plain.waiting:
            sequence = self.plain.waiting[which % len(self.plain.waiting)]
            self.queue.remove(sequence)
            sequence.standing.aged = True
            self.queue.push(sequence)

    @rule(times=st.integers(1, 4))
    def serve_some(self, times: int) -> None:
        for _ in range(times):
            self.serve(-1)

    @rule(first=st.integers(-2, -1))
    def serve(self, first: int) -> None:
        sequence = head(self.queue, min([first, *(s.priority for s in self.queue)]))
        assert sequence is self.plain.head(min([first, *(s.priority for s in self.plain.waiting)]))
        if sequence is None:
            return
        self.queue.remove(sequence)
        self.plain.waiting.remove(sequence)
        sequence.standing.account.count(waiting=-1, holding=1)
        self.under_way.append(sequence)

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 99), tokens=st.integers(0, 30), ends=st.booleans(), comes_back=st.booleans())
    def compute(self, which: int, tokens: int, ends: bool, comes_back: bool) -> None:
        sequence = self.under_way[which % len(self.under_way)]
        before = sequence.standing.charged
        sequence.computed = min(len(sequence.prompt), sequence.computed + tokens)
        sequence.standing.charge(sequence.computed)
        sequence.standing.account.charge(0, 1)
        self.plain.times[sequence.tenant] += sequence.standing.charged - before + 2
        if not (ends or comes_back):
            return
        self.under_way.remove(sequence)
        sequence.standing.account.count(waiting=not ends, holding=-1)
        if ends:
            self.plain.active[sequence.tenant] -= 1
        else:
            sequence.standing.aged = False
            self.plain.waiting.append(sequence)
            self.queue.push(sequence)

    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        if self.plain.waiting:
            sequence = self.plain.waiting.pop(which % len(self.plain.waiting))
            self.queue.remove(sequence)
            sequence.standing.account.count(waiting=-1, holding=0)
            self.plain.active[sequence.tenant] -= 1

    @rule(tenant=st.integers(0, 2), priority=st.integers(-1, 1))
    def last(self, tenant: int, priority: int) -> None:
        queue = [s for s in self.plain.waiting if s.queue_key == (priority, str(tenant))]
        order = sorted(queue, key=lambda s: (not s.standing.aged, s.standing.due, s.standing.arrival))
        assert self.queue.last((priority, str(tenant))) is (order[-1] if order else None)

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "queue"):
            assert set(self.queue) == set(self.plain.waiting)
            assert len(self.queue) == len(self.plain.waiting)
            assert self.queue.priorities == Counter((s.priority, s.standing.aged) for s in self.plain.waiting)

    @invariant()
    def walks_in_order(self) -> None:
        if hasattr(self, "queue"):
            forwards = self.queue.forwards(-2)
            assert [rank for rank, _ in forwards] == sorted(rank for rank, _ in forwards)
            for group_rank, members in forwards:
                assert {rank(member, -2)[:3] for member in members} == {group_rank}
            assert Counter(s for _, members in forwards for s in members) == Counter(self.plain.waiting)


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestQueueIsAsPlain = QueueMachine.TestCase


class TestManyTenants:
    def test_nothing_is_looked_at_for_each_of_them(self) -> None:
        looks = 0

        def counted(key: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def look(item: Any) -> Any:
                nonlocal looks
                looks += 1
                return key(item)

            return look

        scheduler, runner = Scheduler(1, 64, Policy(patience=30.0)), FakeRunner()
        rankings: list[Any] = [scheduler._tenants._by_time, scheduler.stages.ageing, *scheduler._queue._ranked]
        for ranking in rankings:
            ranking._key = counted(ranking._key)
        for number in range(20_000):
            sequence = make_sequence([1] * (1 + number % 7), 1, tenant=f"@{number}", priority=number % 2)
            scheduler.submit([sequence])
        pushed, looks = looks, 0
        assert pushed < 8 * 20_000
        for plan in range(200):
            now = 40.0 if plan > 100 else 1.0
            step = scheduler.plan(now)
            assert step is not None
            assert len(scheduler.commit(step, runner.run(step.plan), now)) == 1
        assert looks < 200 * (FORGET + 10 * AGE)
        assert looks < 100 * 20_000 / 4

    def test_a_slot_given_back_moves_no_queue_however_many_priorities_a_tenant_waits_at(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scheduler, runner = Scheduler(8, 64), FakeRunner()
        scheduler.submit(make_sequence([1], 1, tenant="a", priority=-1) for _ in range(8))
        scheduler.submit(make_sequence([1], 1, tenant="a", priority=number) for number in range(2000))
        step = scheduler.plan(0.0)
        assert step is not None
        put = Counter[str]()
        known = Ranking.put

        def counted(ranking: Ranking[Any], item: Any) -> None:
            put["queues"] += 1
            known(ranking, item)

        monkeypatch.setattr(Ranking, "put", counted)
        assert len(scheduler.commit(step, runner.run(step.plan), 1.0)) == 8
        assert scheduler.plan(1.0) is not None
        assert put["queues"] < 10 * 8

    def test_idle_ones_are_forgotten(self) -> None:
        waiting = Waiting()
        for number in range(5000):
            waiting.submit(make_sequence([1] * 3, 1, tenant=f"@{number}"))
            waiting.serve()
        assert len(waiting.tenants._known) == len(waiting.tenants._by_time) <= 2
        assert len(waiting.tenants._by_time._heap) < 200
        assert not waiting.queue._members
        assert not waiting.queue.priorities
        assert not any(len(ranking) for ranking in waiting.queue._ranked)

    def test_a_priority_that_waits_too_long_takes_turns_with_the_first(self) -> None:
        scheduler, runner = Scheduler(1, 64, Policy(patience=30.0)), FakeRunner()
        scheduler.submit(make_sequence([1], 1, name="f", tenant="f", priority=-1000) for _ in range(6))
        scheduler.submit(make_sequence([1], 1, name="l", tenant="l", priority=1000) for _ in range(3))
        order = ""
        for plan in range(9):
            step = scheduler.plan(30.0 if plan >= 2 else 29.0)
            assert step is not None
            scheduler.commit(step, runner.run(step.plan), 30.0)
            order += step.sequences[0].id
        assert order == "ffllflfff"

    def test_one_that_has_aged_competes_in_the_first_priority_that_comes_later(self) -> None:
        """Those that come while it waits have an earlier one each time; its tenant has had less than theirs."""
        scheduler, runner = Scheduler(1, 64, Policy(patience=30.0)), FakeRunner()
        late = make_sequence([1], 1, tenant="late", priority=5)
        scheduler.submit([make_sequence([1], 3, tenant="first"), late])
        served = []
        for plan in range(20):
            scheduler.submit([make_sequence([1], 3, tenant="first", priority=-plan)])
            step = scheduler.plan(31.0 if plan >= 10 else 1.0)
            assert step is not None
            scheduler.commit(step, runner.run(step.plan), 31.0)
            served.append(late in step.sequences)
        assert not any(served[:10])
        assert served[10]


class TestPrefixes:
    @given(TOKENS, TOKENS)
    def test_common_counts_equal_tokens(self, one: list[int], other: list[int]) -> None:
        expected = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
        assert common(pack(one), pack(other)) == expected

    @given(st.lists(TOKENS, max_size=12), TOKENS)
    def test_a_prompt_parts_from_the_one_most_like_it(self, earlier: list[list[int]], prompt: list[int]) -> None:
        recent = RecentPrompts()
        for other in earlier:
            recent.parting("", pack(other))
        longest = max((common(pack(prompt), pack(other)) for other in earlier), default=0)
        assert recent.parting("other", pack(prompt)) == 0
        assert recent.parting("", pack(prompt)) == longest

    def test_the_record_is_bounded(self) -> None:
        recent = RecentPrompts()
        for number in range(RECENT + 1):
            recent.parting("", pack([number, 1, 2]))
        assert recent.parting("", pack([0, 1, 2])) == 0
        assert recent.parting("", pack([RECENT, 1, 2])) == 3

    def test_bytes_are_tokens_too(self) -> None:
        assert pack(b"abc") == pack([97, 98, 99])


class TestPrefixCache:
    @given(st.lists(TOKENS.filter(bool), max_size=12), TOKENS.filter(bool))
    def test_the_longest_prefix_is_found(self, cached: list[list[int]], prompt: list[int]) -> None:
        cache = PrefixCache()
        for slot, tokens in enumerate(cached):
            if cache.get("", pack(tokens), len(tokens)) is None:
                cache.add(Entry.of("", pack(tokens), len(tokens), slot))
        fitting = [len(tokens) for tokens in cached if len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens]
        found = cache.find("", pack(prompt), len(prompt) - 1)
        assert (0 if found is None else found.length) == max(fitting, default=0)
        assert cache.find("another namespace", pack(prompt), len(prompt)) is None
        for entry in list(cache):
            cache.drop(entry)
        assert cache.find("", pack(prompt), len(prompt)) is None

    def test_what_saves_least_goes_first_and_age_counts(self) -> None:
        cache = PrefixCache()
        long, short, fresh = (
            Entry.of("", pack([token] * length), length, slot)
            for slot, (token, length) in enumerate(((1, 90), (1, 30), (2, 95)))
        )
        for entry in (long, short):
            cache.add(entry)
        assert cache.least(on_device=False) is short
        for _ in range(5):
            cache.use(short)
        assert cache.least(on_device=False) is long
        cache.drop(long)
        cache.add(fresh)
        assert cache.least(on_device=False) is short is not fresh


def test_the_cost_of_a_step_is_learned_in_spite_of_outliers_and_tracked() -> None:
    draw, cost = random.Random(1), StepCost()
    for factor in (1.0, 3.0):
        for number in range(600):
            decodes, prefill = draw.randrange(1, 64), draw.choice((0, 0, 32, 256))
            seconds = factor * (0.002 + 0.0003 * decodes + 0.0001 * prefill) * draw.uniform(0.97, 1.03)
            cost.observe(decodes, prefill, seconds * (50 if number % 29 == 0 else 1))
        exact = factor * (0.002 + 0.0003 * 32 + 0.0001 * 100)
        assert abs(cost.seconds(32, 100) - exact) < 0.15 * exact


class TestStepSize:
    def test_shrinks_prompts_first_and_grows_back(self) -> None:
        size = StepSize(100, 8)
        for prefill, width in ((50, 8), (25, 8), (16, 8), (16, 3)):
            assert size.shrink(40, 6)
            assert (size.prefill, size.width) == (prefill, width)
        assert steps_to_grow(size) == 3 * PATIENCE
        assert (size.prefill, size.width) == (100, 8)
        assert not StepSize(8, 1).shrink(0, 1)

    def test_waits_longer_after_having_grown_too_far(self) -> None:
        size, waits = StepSize(64, 8), []
        for _ in range(4):
            size.shrink(64, 8)
            waits.append(steps_to_grow(size))
        assert waits == [PATIENCE, 2 * PATIENCE, 4 * PATIENCE, 8 * PATIENCE]


def steps_to_grow(size: StepSize) -> int:
    steps = 0
    while size.is_reduced:
        size.succeeded()
        steps += 1
    return steps


def test_completions_of_one_prompt_share_its_bytes() -> None:
    sharing = Sharing(SlotAllocator(4, Policy()), cache_prefixes=False, share_all=True, least=2)
    prompts = [list(range(100)), list(range(100))]
    sequences = [make_sequence(prompt, 1) for prompt in prompts for _ in range(3)]
    packed = [sharing._packed(sequence) for sequence in sequences]
    assert len({id(each) for each in packed}) == len(prompts)
    assert packed == [pack(prompts[0])] * 6
