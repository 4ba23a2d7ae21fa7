"""The scheduler's parts, each by itself."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bdh_batch.scheduler import fair_queue
from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.fair_queue import AGE, FORGET, FairQueue
from bdh_batch.scheduler.places import Places
from bdh_batch.scheduler.prefix_cache import PrefixCache
from bdh_batch.scheduler.prefixes import RECENT, RecentPrompts, common, pack
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.sharing import Sharing
from bdh_batch.scheduler.step_size import PATIENCE, StepSize
from tests.scheduler.fakes import make_sequence

TOKENS = st.lists(st.integers(0, 2), max_size=40)


def queue_of(*sequences: Sequence, weights: dict[str, float] | None = None) -> FairQueue:
    queue = FairQueue(weights)
    for place, sequence in enumerate(sequences):
        sequence.place = place
        queue.push(sequence)
    return queue


def serve(queue: FairQueue) -> str | None:
    """The next one has its turn, and its prompt is computed."""
    sequence = queue.peek(min((waiting.priority for waiting in queue), default=0))
    if sequence is None:
        return None
    queue.serve(sequence)
    sequence.scheduled = 0.0
    sequence.computed = len(sequence.prompt)
    sequence.pay()
    return sequence.id


def served(queue: FairQueue) -> list[str]:
    order = []
    while (name := serve(queue)) is not None:
        order.append(name)
    assert len(queue) == queue.tokens == 0
    return order


class TestFairQueue:
    def test_lower_classes_go_first_and_inside_a_key_who_came_first(self) -> None:
        queue = queue_of(
            *(make_sequence([1], 1, name=name, priority=priority) for name, priority in (("a", 1), ("b", 0), ("c", 0)))
        )
        assert served(queue) == ["b", "c", "a"]

    def test_keys_take_turns_whatever_they_queue(self) -> None:
        flood = [make_sequence([1], 1, name="f", key="f") for _ in range(6)]
        drop = [make_sequence([1], 1, name="d", key="d") for _ in range(2)]
        assert served(queue_of(*flood, *drop)) == ["f", "d", "f", "d", "f", "f", "f", "f"]

    def test_weights_are_shares(self) -> None:
        sequences = [make_sequence([1], 1, name=key, key=key) for key in "ab" for _ in range(40)]
        order = served(queue_of(*sequences, weights={"a": 3.0}))
        assert 28 <= order[:40].count("a") <= 32

    def test_a_sequence_can_bring_its_weight_and_be_in_another_share_than_its_keys(self) -> None:
        sequences = [make_sequence([1], 1, name=name) for name in "ab" for _ in range(40)]
        for sequence in sequences:
            sequence.tenant, sequence.weight = sequence.id, 3.0 if sequence.id == "a" else None
        order = served(queue_of(*sequences, weights={"b": 1.0}))
        assert 28 <= order[:40].count("a") <= 32

    def test_a_pause_saves_nothing_up(self) -> None:
        queue = queue_of(*(make_sequence([1], 1, name="a", key="a") for _ in range(50)))
        for _ in range(40):
            serve(queue)
        for place in range(100, 110):
            late = make_sequence([1], 1, name="b", key="b")
            late.place = place
            queue.push(late)
        assert 4 <= served(queue)[:10].count("b") <= 6

    def test_what_was_charged_and_never_computed_is_no_debt(self) -> None:
        queue = queue_of(make_sequence([1] * 50, 1, key="a"), make_sequence([1] * 50, 1, key="a"))
        given_up = queue.peek(0)
        assert given_up is not None
        queue.serve(given_up)
        given_up.scheduled = 0.0
        account = given_up.account
        assert (account.used, account.had) == (50, 0)
        given_up.computed = 20
        given_up.pay()
        assert (account.used, account.had) == (50, 20)
        queue.ended(given_up)
        assert (account.used, account.had) == (20, 20)

    def test_who_is_refunded_comes_before_who_has_used_more(self) -> None:
        prompts = {"a": [1] * 50, "b": [1] * 30}
        queue = queue_of(*(make_sequence(prompts[key], 1, name=key, key=key) for key in "abab"))
        given_up = queue.peek(0)
        assert given_up is not None
        queue.serve(given_up)
        given_up.scheduled = 0.0
        assert serve(queue) == "b"
        after = queue.peek(0)
        assert after is not None
        assert (given_up.id, after.id) == ("a", "b")
        queue.ended(given_up)
        assert served(queue) == ["a", "b"]

    def test_a_weight_that_changes_leaves_nothing_owed(self) -> None:
        queue = queue_of(make_sequence([1] * 50, 1, key="a"))
        waiting = queue.peek(0)
        assert waiting is not None
        queue.serve(waiting)
        waiting.scheduled = 0.0
        waiting.account.weigh(0.1)
        waiting.computed = 20
        waiting.pay()
        queue.ended(waiting)
        assert (waiting.account.used, waiting.account.had) == (20, 20)

    def test_who_worked_alone_is_in_nobodys_debt(self) -> None:
        queue = queue_of(make_sequence([1], 1, name="a", key="a"))
        serve(queue)
        queue.account("a").used += 10_000  # what it has generated meanwhile
        for place in range(10, 30):
            flood = make_sequence([1], 1, name="b", key="b")
            flood.place = place
            queue.push(flood)
        late = make_sequence([1], 1, name="a", key="a")
        late.place = 40
        queue.push(late)
        assert "a" in served(queue)[:2]

    def test_one_that_comes_back_has_its_old_place(self) -> None:
        sequences = [make_sequence([1], 1, name=name) for name in "abc"]
        queue = queue_of(*sequences)
        queue.remove(sequences[0])
        queue.push(sequences[0])
        assert served(queue) == ["a", "b", "c"]


class Plain:
    """Who is next, by looking at all tenants and all that wait: what `FairQueue` says without."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.waiting: list[Sequence] = []
        self.used: dict[str, float] = {}
        self.owed: Counter[str] = Counter()
        self.charged: Counter[str] = Counter()  # sequences under way
        self.most = 0.0

    def push(self, sequence: Sequence) -> None:
        tenant, busy = sequence.tenant, {s.tenant for s in self.waiting} | {*+self.charged}
        had = [self.used[other] - self.owed[other] for other in busy]
        if tenant not in busy:
            self.used[tenant] = max(self.used.get(tenant, 0.0), min(had) if had else max([0.0, *self.used.values()]))
        self.waiting.append(sequence)

    def peek(self, first: int, now: float) -> Sequence | None:
        def competes(sequence: Sequence) -> tuple[int, float, int]:
            queue = [other for other in self.waiting if other.line == sequence.line]
            head = min(queue, key=lambda other: other.place)
            aged = now - head.served_at >= self.patience
            return first if aged else sequence.priority, self.used[sequence.tenant], sequence.place

        return min(self.waiting, key=competes, default=None)


class FairQueueMachine(RuleBasedStateMachine):
    @initialize(patience=st.sampled_from([math.inf, 5.0]))
    def begin(self, patience: float) -> None:
        self.queue, self.plain = FairQueue(patience=patience), Plain(patience)
        self.under_way: list[Sequence] = []
        self.places, self.now, self.level = 0, 0.0, 0.0

    @rule(tenant=st.integers(0, 2), tokens=st.integers(1, 30), priority=st.sampled_from([0, 0, 0, -1, 1]))
    def push(self, tenant: int, tokens: int, priority: int) -> None:
        sequence = make_sequence([1] * tokens, 1, key=str(tenant), priority=priority)
        self.places += 1
        sequence.place, sequence.served_at = self.places, self.now
        self.plain.push(sequence)
        self.queue.push(sequence)

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.queue.age(self.now)

    @rule(times=st.integers(1, 4))
    def serve_some(self, times: int) -> None:
        for _ in range(times):
            self.serve(-1)

    @rule(first=st.integers(-2, -1))
    def serve(self, first: int) -> None:
        sequence = self.queue.peek(min([first, *(s.priority for s in self.queue)]))
        assert sequence is self.plain.peek(min([first, *(s.priority for s in self.plain.waiting)]), self.now)
        if sequence is None:
            return
        self.queue.serve(sequence)
        self.plain.waiting.remove(sequence)
        if sequence.scheduled is None:
            self.plain.used[sequence.tenant] += len(sequence.prompt)
            self.plain.owed[sequence.tenant] += len(sequence.prompt)
            self.plain.charged[sequence.tenant] += 1
        sequence.scheduled = self.now
        self.under_way.append(sequence)

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 99), tokens=st.integers(0, 30), ends=st.booleans(), comes_back=st.booleans())
    def compute(self, which: int, tokens: int, ends: bool, comes_back: bool) -> None:
        sequence = self.under_way[which % len(self.under_way)]
        sequence.served_at = self.now
        before = sequence.owed
        sequence.computed = min(len(sequence.prompt), sequence.computed + tokens)
        sequence.pay()
        self.plain.owed[sequence.tenant] -= before - sequence.owed
        sequence.account.used += 2
        self.plain.used[sequence.tenant] += 2
        if ends:
            self.under_way.remove(sequence)
            self.plain.used[sequence.tenant] -= sequence.owed
            self.plain.owed[sequence.tenant] -= sequence.owed
            self.plain.charged[sequence.tenant] -= 1
            self.queue.ended(sequence)
        elif comes_back:
            self.under_way.remove(sequence)
            self.plain.push(sequence)
            self.queue.push(sequence)

    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        if self.plain.waiting:
            sequence = self.plain.waiting.pop(which % len(self.plain.waiting))
            self.queue.remove(sequence)
            if sequence.scheduled is not None:
                self.plain.used[sequence.tenant] -= sequence.owed
                self.plain.owed[sequence.tenant] -= sequence.owed
                self.plain.charged[sequence.tenant] -= 1
                self.queue.ended(sequence)

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "queue"):
            assert set(self.queue) == set(self.plain.waiting)
            assert len(self.queue) == len(self.plain.waiting)
            before, self.level = self.level, self.queue._level()
            assert before <= self.level, "nothing is saved up"


FairQueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFairQueueIsAsPlain = FairQueueMachine.TestCase


class TestManyTenants:
    def test_nothing_is_looked_at_for_each_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = 0

        def counted(key: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def look(item: Any) -> Any:
                nonlocal looks
                looks += 1
                return key(item)

            return look

        queue = FairQueue(patience=30.0)
        for ranking in (queue._by_had, queue._aged, queue._due):
            ranking._key = counted(ranking._key)
        monkeypatch.setattr(fair_queue, "TURN", counted(fair_queue.TURN))
        for place in range(20_000):
            sequence = make_sequence([1] * (1 + place % 7), 1, key=f"@{place}", priority=place % 2)
            sequence.place = place
            queue.push(sequence)
        pushed, looks = looks, 0
        assert pushed < 6 * 20_000
        for plan in range(200):
            queue.age(40.0 if plan > 100 else 1.0)
            sequence_or_none = queue.peek(0)
            assert sequence_or_none is not None
            queue.serve(sequence_or_none)
            sequence_or_none.scheduled = 1.0
            queue.ended(sequence_or_none)
        assert looks < 200 * (FORGET + 10 * AGE)
        assert looks < 100 * 20_000 / 4

    def test_idle_ones_are_forgotten(self) -> None:
        queue = FairQueue()
        for place in range(5000):
            sequence = make_sequence([1] * 3, 1, key=f"@{place}")
            sequence.place = place
            queue.push(sequence)
            serve(queue)
            queue.ended(sequence)
        assert len(queue._accounts) == len(queue._by_had) <= 2
        assert len(queue._by_had._heap) < 200
        assert not queue._queues
        assert not queue._classes

    def test_a_class_that_waits_too_long_takes_turns_with_the_first(self) -> None:
        first = [make_sequence([1], 1, name="f", key="f", priority=-1000) for _ in range(6)]
        later = [make_sequence([1], 1, name="l", key="l", priority=1000) for _ in range(3)]
        queue = queue_of(*first, *later)
        queue._patience = 30.0
        queue.age(29.0)
        assert [serve(queue) for _ in range(2)] == ["f", "f"]
        queue.age(30.0)
        assert served(queue) == ["l", "l", "f", "l", "f", "f", "f"]


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
    def test_the_longest_beginning_is_found(self, kept: list[list[int]], prompt: list[int]) -> None:
        cache = PrefixCache()
        for slot, tokens in enumerate(kept):
            if cache.get("", pack(tokens), len(tokens)) is None:
                cache.add("", pack(tokens), len(tokens), slot)
        fitting = [len(tokens) for tokens in kept if len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens]
        found = cache.find("", pack(prompt), len(prompt) - 1)
        assert (0 if found is None else found.length) == max(fitting, default=0)
        assert cache.find("another key", pack(prompt), len(prompt)) is None
        for entry in list(cache):
            cache.drop(entry)
        assert cache.find("", pack(prompt), len(prompt)) is None

    def test_what_saves_least_goes_first_and_age_counts(self) -> None:
        cache = PrefixCache()
        long, short = (cache.add("", pack([1] * length), length, length) for length in (90, 30))
        assert cache.least(on_device=False) is short
        for _ in range(5):
            cache.use(short)
        assert cache.least(on_device=False) is long
        cache.drop(long)
        fresh = cache.add("", pack([2] * 95), 95, 3)
        assert cache.least(on_device=False) is short is not fresh


def test_the_cost_of_a_step_is_learned_in_spite_of_outliers_and_followed() -> None:
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


def test_answers_to_one_prompt_share_its_bytes() -> None:
    sharing = Sharing(Places(4, 0), keep=False, share_all=True, least=2)
    prompts = [list(range(100)), list(range(100))]
    sequences = [make_sequence(prompt, 1) for prompt in prompts for _ in range(3)]
    packed = [sharing._packed(sequence) for sequence in sequences]
    assert len({id(each) for each in packed}) == len(prompts)
    assert packed == [pack(prompts[0])] * 6
