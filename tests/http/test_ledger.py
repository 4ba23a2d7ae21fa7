"""What is counted in a minute, by a clock that the tests set: in memory, and in a Redis that fakeredis plays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from fakeredis import FakeRedis
from hypothesis import given, settings, strategies as st

from bdh_batch.http.auth import ledger as ledger_module
from bdh_batch.http.auth.ledger import (
    FORGET,
    RETAINED,
    SHARED,
    SLOTS,
    Grant,
    Ledger,
    MemoryLedger,
    RedisLedger,
    whole_seconds,
)

MINUTE = 60.0
LIMIT = 100
LATE = 1 / SLOTS + 1e-6  # seconds after a minute by which all is free again

times = st.floats(0, 70) | st.sampled_from([0.0, 0.25, 59.75, 60.0, 60.25])
takes = st.tuples(st.just("take"), times, st.sampled_from("ab"), st.integers(0, LIMIT))
ends = st.tuples(st.just("end"), times, st.integers(0, 5), st.integers(0, LIMIT))
histories = st.lists(takes | takes | ends, max_size=40)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def counting(kind: str, clock: Clock) -> Iterator[Ledger]:
    if kind == "memory":
        yield MemoryLedger(clock)
    elif kind == "shared logs":
        crowded = MemoryLedger(clock, most=0)
        with patch.object(ledger_module, "SHARED", 10**9):  # each has one for itself
            yield crowded
    else:
        with patch.object(time, "time", clock):
            yield RedisLedger(FakeRedis())


@pytest.mark.parametrize("kind", ["memory", "shared logs", "redis"])
def test_no_minute_has_more_than_the_limit_and_none_is_refused_for_more(kind: str) -> None:
    @settings(deadline=None, database=None, max_examples=40 if kind == "redis" else 150)
    @given(histories)
    def check(history: list[tuple[Any, ...]]) -> None:
        clock = Clock()
        with counting(kind, clock) as ledger:
            charged: list[tuple[str, float, list[int]]] = []  # whose, when, how much by now
            open_grants: list[tuple[Grant, list[int]]] = []
            for what, later, who, amount in history:
                clock.now += later
                if what == "take":
                    grant = ledger.take(who, amount, LIMIT, own_log=False)
                    mine = [(clock.now - at, held[0]) for name, at, held in charged if name == who]
                    least = sum(held for age, held in mine if age <= MINUTE)
                    most = sum(held for age, held in mine if age <= MINUTE + LATE)
                    assert grant.granted or most + amount > LIMIT, "nobody is refused what is free"
                    assert not grant.granted or least + amount <= LIMIT, "no minute has more than the limit"
                    assert 0 <= grant.remaining <= LIMIT - least - amount * grant.granted
                    assert 0 < grant.wait <= MINUTE + LATE
                    if grant.granted:
                        charged.append((who, clock.now, held := [amount]))
                        open_grants.append((grant, held))
                elif who < len(open_grants):
                    grant, held = open_grants.pop(who)
                    unused = min(held[0], amount)
                    ledger.give_back(grant, unused)
                    held[0] -= unused

    check()


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_who_waits_as_long_as_was_told_is_not_refused_again(kind: str) -> None:
    clock = Clock()
    with counting(kind, clock) as ledger:
        for _ in range(4):
            ledger.take("a", 25, LIMIT, own_log=False)
            clock.now += 7.3
        refused = ledger.take("a", 40, LIMIT, own_log=False)
        assert not refused.granted
        clock.now += refused.wait - 2 / SLOTS
        assert not ledger.take("a", 40, LIMIT, own_log=False).granted
        clock.now += 2 / SLOTS + 1e-5
        assert ledger.take("a", 40, LIMIT, own_log=False).granted


def test_a_crowd_that_ends_at_once_is_let_in_no_twice() -> None:
    """A window that begins with a caller's first request lets nearly twice the limit through about its end."""
    clock = Clock()
    with counting("memory", clock) as ledger:
        first = ledger.take("a", LIMIT, LIMIT, own_log=False)
        clock.now += 59.9
        ledger.give_back(first, LIMIT - 1)
        assert ledger.take("a", LIMIT - 1, LIMIT, own_log=False).granted
        clock.now += 1.0
        assert ledger.take("a", LIMIT, LIMIT, own_log=False).remaining == 1
        ledger.give_back(first, 1)
        assert ledger.take("a", 2, LIMIT, own_log=False).remaining == 1


def test_redis_whose_clock_is_put_back_counts_what_it_knows_for_a_minute_and_no_longer() -> None:
    clock = Clock()
    with counting("redis", clock) as ledger:
        assert ledger.take("a", LIMIT, LIMIT, own_log=False).granted
        clock.now -= 3600
        assert not ledger.take("a", 1, LIMIT, own_log=False).granted
        clock.now += MINUTE + LATE
        assert ledger.take("a", LIMIT, LIMIT, own_log=False).granted


def test_redis_forgets_who_does_not_come_again() -> None:
    clock = Clock()
    with counting("redis", clock) as ledger:
        assert isinstance(ledger, RedisLedger)
        ledger.take("a", 1, LIMIT, own_log=False)
        assert ledger.client.keys() == [b"bdh:rate:a"]
        clock.now += MINUTE + 5
        assert ledger.client.keys() == []


class TestMemory:
    def test_forgets_who_has_taken_nothing_for_a_minute_and_looks_at_few(self) -> None:
        clock = Clock()
        ledger = MemoryLedger(clock)
        for number in range(1000):
            ledger.take(f"@{number}", 1, LIMIT, own_log=False)
        assert len(ledger) == 1000
        clock.now += MINUTE + LATE
        for taken in range(1, 100):
            ledger.take("b", 1, LIMIT, own_log=False)
            assert len(ledger) == 1000 - taken * FORGET + 1
        ledger.forget(10_000)
        assert len(ledger) == 1
        clock.now += MINUTE + LATE
        ledger.forget(10_000)
        assert len(ledger) == 0

    def test_one_log_does_not_grow_with_what_is_taken(self) -> None:
        clock = Clock()
        ledger = MemoryLedger(clock)
        for _ in range(20_000):
            clock.now += 0.01
            ledger.take("a", 1, 10**9, own_log=False)
        assert len(ledger._logs["a"]) == RETAINED + 1

    def test_newcomers_share_logs_where_too_many_are_known_and_pass_no_limit(self) -> None:
        clock = Clock()
        ledger = MemoryLedger(clock, most=500)
        granted = {}
        for number in range(3 * SHARED):
            clock.now += 0.001
            grants = [ledger.take(f"@{number}", 1, 3, own_log=False).granted for _ in range(5)]
            granted[number] = sum(grants)
        assert len(ledger) <= 500 + SHARED
        assert max(granted.values()) == 3
        assert all(granted[number] == 3 for number in range(500))
        assert sum(granted.values()) < 3 * len(granted), "they do share"
        assert ledger.take("a key", 1, 3, own_log=True).remaining == 2, "keys do not"

    def test_who_shared_a_log_does_not_begin_anew_when_there_is_room_again(self) -> None:
        clock = Clock()
        ledger = MemoryLedger(clock, most=1)
        ledger.take("first", 1, 3, own_log=False)
        clock.now += 30
        assert [ledger.take("late", 1, 3, own_log=False).granted for _ in range(4)] == [True] * 3 + [False]
        clock.now += 31
        ledger.forget(10)
        assert not ledger.take("late", 1, 3, own_log=False).granted

    def test_goes_by_a_clock_that_is_never_put_back(self) -> None:
        ledger = MemoryLedger()
        ledger.take("a", LIMIT, LIMIT, own_log=False)
        with patch.object(time, "time", lambda: 0.0):
            assert 0 < ledger.take("a", 1, LIMIT, own_log=False).wait <= MINUTE + LATE


def test_seconds_to_wait_are_whole_and_within_a_minute() -> None:
    assert [whole_seconds(wait) for wait in (0.0, 0.1, 1.0, 1.1, 60.2)] == [1, 1, 1, 2, 60]
