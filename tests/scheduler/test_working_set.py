"""When a state may begin in memory that was never touched."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.prefix_index import Entry
from bdh_batch.scheduler.prefixes import pack
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.slots import Slots
from bdh_batch.scheduler.working_set import STEP, WorkingSet, free_slots, running_slots
from tests.scheduler.fakes import FakeRunner, expected_tokens, make_sequence

STEM = [7 * at % 251 for at in range(60)]
PROMPTS = st.lists(st.integers(0, 2), min_size=2, max_size=6)
POLICY = {"cache_prefixes": True, "share_all": True, "min_shared": 8}


def entry_of(tokens: list[int]) -> Entry:
    return Entry.of("", pack(tokens), len(tokens), 0)


class Engine:
    """A scheduler and a runner, with a clock that stands still unless it is moved."""

    def __init__(self, slots: int, **policy: object) -> None:
        self.scheduler = Scheduler(slots, 64, Policy(**{**POLICY, **policy}))  # type: ignore[arg-type]
        self.runner = FakeRunner()
        self.now = 0.0
        self.released: list[int] = []

    @property
    def touched(self) -> int:
        return self.scheduler.allocator.slots.touched

    def step(self) -> bool:
        step = self.scheduler.plan(self.now)
        check_invariants(self.scheduler)
        if step is None:
            return False
        self.released += step.plan.releases
        self.scheduler.commit(step, self.runner.run(step.plan), self.now)
        return True

    def ask(self, *prompts: list[int], max_tokens: int = 4) -> int:
        """All of `prompts` at once, to their end. Gives how many prompt tokens were found in the cache."""
        before = self.scheduler.sharing.hits
        self.scheduler.submit(make_sequence(prompt, max_tokens) for prompt in prompts)
        while self.scheduler.has_work:
            assert self.step()
        return self.scheduler.sharing.hits - before


def conversation(number: int, length: int = 20) -> list[int]:
    return [number, 200] * (length // 2)


def converse(engine: Engine, conversations: int, turns: int, repeated: bool = True) -> list[int]:
    """How many of the conversations began with a state of their last turn, by turn; each speaks once a turn.

    Args:
        repeated: whether the next prompt has the completion as it was.
    """
    prompts, found = [conversation(number) for number in range(conversations)], []
    for _ in range(turns):
        hits = 0
        for number, prompt in enumerate(prompts):
            hits += engine.ask(prompt) >= len(prompt) - 11  # but for what came since
            completion = expected_tokens(prompt, 4) if repeated else [100 + number] * 4
            prompts[number] = [*prompt, *completion, *[100 + number] * 6]
        found.append(hits)
    return found


class TestSlots:
    def test_touched_ones_come_back_last_in_first_out_and_untouched_ones_from_the_lowest(self) -> None:
        slots = Slots(5)
        assert slots.take_touched() is None
        assert [slots.take_untouched() for _ in range(3)] == [0, 1, 2]
        for now, slot in enumerate((1, 0, 2)):
            slots.give(slot, float(now))
        assert (slots.touched, slots.idle_since) == (3, 0.0)
        assert slots.take_touched() == 2
        assert (slots.release_idle(), slots.touched, slots.idle_since) == (1, 2, 1.0)
        assert [slots.take_untouched() for _ in range(3)] == [1, 3, 4]
        assert (slots.take_touched(), slots.take_touched(), slots.take_untouched()) == (0, None, None)


class TestRule:
    @given(st.integers(1, 1000), st.integers(1, 1000))
    def test_shares_fit_and_leave_something_for_cached_prefixes(self, slots: int, most: int) -> None:
        running = min(most, running_slots(slots))
        free = free_slots(slots, running)
        assert 1 <= running <= free <= slots
        assert running_slots(slots) == slots or running_slots(slots) >= 64
        assert free == slots or free - running >= slots // 8
        assert free == slots or free - slots // 2 in (0, running + slots // 8 - slots // 2)

    @given(
        st.integers(1, 12),
        st.integers(1, 12),
        st.lists(st.tuples(st.sampled_from(["evict", "ask", "idle"]), PROMPTS), max_size=60),
    )
    def test_the_working_set_grows_by_nothing_but_what_was_evicted_and_asked_for(
        self, slots: int, free: int, events: list[tuple[str, list[int]]]
    ) -> None:
        rule = WorkingSet(slots, free)
        evicted: list[list[int]] = []
        for event, tokens in events:
            size = rule.size
            if event == "evict":
                rule.evicted(entry_of(tokens))
                evicted = [other for other in evicted if other != tokens][-slots + 1 :] if slots > 1 else []
                evicted.append(tokens)
            elif event == "ask":
                rule.asked("", pack(tokens), len(tokens) - 1, 0)
                wanted = [other for other in evicted if len(other) < len(tokens) and tokens[: len(other)] == other]
                grown = min(slots, size + STEP) if wanted and free < slots else size
                assert rule.size == grown, "once for each request that would have found one"
                if wanted:
                    evicted.remove(max(wanted, key=len))
            else:
                rule.shrink()
                assert rule.size == max(min(slots, free), size - 1)
            assert min(slots, free) <= rule.size <= slots
            assert [rule.may_grow(touched) for touched in range(slots + 1)] == [t < rule.size for t in range(slots + 1)]

    def test_another_namespace_or_a_shorter_prefix_than_was_found_is_no_evidence(self) -> None:
        rule = WorkingSet(10, 2)
        rule.evicted(entry_of([1, 2, 3]))
        rule.asked("other", pack([1, 2, 3, 4]), 3, 0)
        rule.asked("", pack([1, 2, 3, 4]), 3, 3)
        assert rule.size == 2
        rule.asked("", pack([1, 2, 3, 4]), 3, 2)
        assert rule.size == 2 + STEP


class TestScheduler:
    def test_completions_that_nobody_asks_to_go_on_stay_within_the_working_set(self) -> None:
        engine = Engine(50, max_running=4, free_slots=8)
        for number in range(0, 120, 4):
            engine.ask(*(conversation(number + at) for at in range(4)))
        assert engine.touched == 8

    def test_more_run_at_once_than_the_working_set_has(self) -> None:
        engine = Engine(12, free_slots=3)
        engine.scheduler.submit(make_sequence(conversation(number), 30) for number in range(12))
        while len(engine.scheduler.running) < 12:
            assert engine.step()
        assert engine.touched == 12

    def test_conversations_that_go_on_are_found_again_from_their_third_turn_at_the_latest(self) -> None:
        engine = Engine(60, max_running=4, free_slots=8)
        found = converse(engine, conversations=20, turns=5)
        assert (found[0], found[2:]) == (0, [20, 20, 20])
        assert 20 <= engine.touched < 60

    def test_each_conversation_needs_one_slot_to_be_found_again(self) -> None:
        assert converse(Engine(24, max_running=2), conversations=20, turns=4) == [0, 20, 20, 20]

    def test_where_templates_change_completions_conversations_go_on_from_their_prompts(self) -> None:
        found = converse(Engine(120, max_running=2, free_slots=8), conversations=20, turns=6, repeated=False)
        assert found[-2:] == [20, 20]

    def test_a_prompt_in_common_stays_however_many_chats_there_are(self) -> None:
        engine = Engine(50, max_running=4, free_slots=8)
        hits = [engine.ask([*STEM, number, 250, number]) for number in range(100)]
        assert all(found >= len(STEM) for found in hits[2:])
        assert engine.touched == 8

    def test_without_a_bound_all_slots_are_used_before_anything_is_evicted(self) -> None:
        engine = Engine(10, max_running=2)
        for number in range(10):
            engine.ask(conversation(number))
        assert (engine.touched, len(engine.scheduler.sharing.cache)) == (10, 10)


class TestIdle:
    @pytest.mark.parametrize("kept", [0, 2])
    def test_free_slots_but_those_kept_go_back_one_a_plan_once_they_are_idle_for_so_long(self, kept: int) -> None:
        engine = Engine(8, cache_prefixes=False, idle_release=60.0, idle_kept=kept)
        engine.ask(*(conversation(number) for number in range(5)))
        assert engine.scheduler.allocator.release_due == 60.0
        engine.now = 59.0
        assert not engine.step()
        engine.now = 61.0
        while engine.step():
            assert not engine.scheduler.has_work
        assert engine.scheduler.allocator.release_due is None
        assert engine.touched == kept
        assert len({*engine.released}) == len(engine.released) == 5 - kept
        engine.ask(conversation(7))
        assert engine.touched == max(1, kept)

    def test_a_slot_in_use_keeps_its_memory_while_others_lose_theirs(self) -> None:
        engine = Engine(8, cache_prefixes=False, idle_release=60.0)
        for _ in range(3):
            engine.ask(*(conversation(number) for number in range(5)))
        for _ in range(100):
            engine.now += 1.0
            engine.ask(conversation(9))
        assert engine.touched == 1
        assert len(engine.released) == 4

    def test_cached_prefixes_stay_within_the_working_set_and_lose_what_it_had_grown_by(self) -> None:
        engine = Engine(40, max_running=2, free_slots=6, idle_release=60.0)
        converse(engine, conversations=15, turns=3)
        assert engine.touched > 6
        engine.now = 100.0
        while engine.step():
            pass
        assert engine.touched == len(engine.scheduler.sharing.cache) == engine.scheduler.allocator.working_set.size == 6

    def test_never_where_it_is_off(self) -> None:
        engine = Engine(4, cache_prefixes=False)
        engine.ask(conversation(1))
        engine.now = 1e9
        assert not engine.step()
        assert engine.scheduler.allocator.release_due is None
        assert engine.touched == 1
