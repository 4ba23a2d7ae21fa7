from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bdh_batch.engine.admission import LONGEST_RETRY, Admission
from bdh_batch.errors import InvalidRequest, QueueFull, TooLate
from bdh_batch.scheduler.backlog import Backlog
from bdh_batch.scheduler.sequence import Sequence
from tests.scheduler.fakes import make_sequence


def full(max_requests: int = 5, max_tokens: int = 100) -> Admission:
    """Two slots, both taken."""
    admission = Admission(max_requests, max_tokens, slots=2)
    admission.update({}, 0, 2, now=0.0)
    return admission


def queue_of(count: int, tenant: str = "", priority: int = 0) -> dict[Sequence, int]:
    """So many that have come to wait in the scheduler."""
    return {make_sequence([1], 1, tenant=tenant, priority=priority): 1 for _ in range(count)}


def test_requests_that_wait_are_bounded() -> None:
    admission = full()
    for _ in range(5):
        admission.admit([make_sequence([1], 1)], 0.0)
    with pytest.raises(QueueFull, match="5 requests"):
        admission.admit([make_sequence([1], 1)], 0.0)
    admission.update({}, 2, 4, now=1.0)
    assert admission.queued == 5  # the inbox has not been taken yet


def test_tokens_that_wait_are_bounded() -> None:
    admission = full()
    admission.admit([make_sequence([1] * 60, 1)], 0.0)
    with pytest.raises(QueueFull, match="60 prompt tokens"):
        admission.admit([make_sequence([1] * 41, 1)], 0.0)
    admission.admit([make_sequence([1] * 40, 1)], 0.0)


def test_a_long_prompt_that_need_not_wait_is_let_in() -> None:
    Admission(5, 100, slots=2).admit([make_sequence([1] * 1000, 1)], 0.0)


def test_more_than_could_ever_run_and_wait_is_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match="7 completions"):
        full().admit([make_sequence([1], 1) for _ in range(8)], 0.0)


def test_all_of_a_request_or_nothing() -> None:
    admission = full()
    with pytest.raises(QueueFull):
        admission.admit([make_sequence([1], 1) for _ in range(6)], 0.0)
    assert admission.queued == 0


def busy(waiting: dict[Sequence, int] | None = None) -> Admission:
    """Ten wait, and a slot is given out every two seconds."""
    admission = full(max_requests=20, max_tokens=1000)
    admission.update(queue_of(10) if waiting is None else waiting, 0, 2, now=0.0)
    for second in range(1, 40):
        admission.update({}, 0, 2 + second // 2, now=float(second))
    return admission


def test_a_wait_is_foreseen_from_the_rate_of_late() -> None:
    admission = busy()
    assert admission.expected_wait(1, (0, "")) == pytest.approx(22.0, rel=0.1)
    assert admission.expected_wait(1, (-1, "")) == pytest.approx(2.0, rel=0.1)


def test_what_would_miss_its_deadline_is_refused_with_the_time_to_come_back() -> None:
    admission = busy()
    with pytest.raises(TooLate) as refusal:
        admission.admit([make_sequence([1], 1, deadline=39.0 + 10.0)], 39.0)
    assert 8 <= refusal.value.retry_after <= 16
    admission.admit([make_sequence([1], 1, deadline=39.0 + 30.0)], 39.0)
    admission.admit([make_sequence([1], 1, deadline=39.0 + 10.0, priority=-1)], 39.0)


def test_no_one_is_asked_to_wait_for_ever() -> None:
    admission = busy()
    admission.update(queue_of(10), 0, 21, now=10_000.0)
    with pytest.raises(QueueFull) as refusal:
        admission.admit([make_sequence([1], 1)], 10_000.0)
    assert 1 <= refusal.value.retry_after <= LONGEST_RETRY


def test_a_crowd_that_is_refused_comes_back_no_faster_than_slots_are_given() -> None:
    admission = busy()
    comes = [0.0] * 30  # so many, a slot a second: each comes again when it was asked to
    refused = []
    for second in range(40, 400):
        admission.update(queue_of(10) if second == 40 else {}, 0, second, now=float(second))
        for who, due in enumerate(comes):
            if due <= second < 300:
                with pytest.raises(QueueFull) as refusal:
                    admission.admit([make_sequence([1], 1)], float(second))
                comes[who] = second + refusal.value.retry_after
                refused.append(second)
    settled = [second for second in refused if second >= 150]
    assert len(settled) <= 1.5 * (300 - 150)
    assert admission.retry_after() == 1


def test_a_rate_of_long_ago_refuses_nobody() -> None:
    waiting = queue_of(10)
    admission = busy(waiting)
    request = make_sequence([1], 1)
    request.deadline = 50.0
    with pytest.raises(QueueFull, match="longer than the request's timeout"):
        admission.admit([request], 40.0)
    for second in range(40, 80):  # every slot is taken, but nobody waits for one
        admission.update(dict.fromkeys(waiting, -1), 0, second, now=float(second))
        waiting = {}
    request.deadline = 90.0
    admission.admit([request], 80.0)


def test_tokens_that_could_never_wait_are_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match="100 prompt tokens"):
        full().admit([make_sequence([1] * 40, 1) for _ in range(3)], 0.0)


def test_another_tenant_does_not_wait_behind_a_whole_queue() -> None:
    admission = busy()
    assert admission.expected_wait(1, (0, "other")) == pytest.approx(4.0, rel=0.1)  # one of the queue, and itself
    admission.admit([make_sequence([1], 1, tenant="other", deadline=39.0 + 10.0)], 39.0)


def test_one_that_makes_another_give_way_need_not_wait() -> None:
    admission = busy()
    admission.update({}, 0, 21, now=40.0, last_priority=0)
    assert admission.expected_wait(1, (-1, "")) == 0.0
    assert admission.expected_wait(1, (0, "")) > 20.0


def test_a_full_queue_is_full_for_those_who_fill_it() -> None:
    admission = full()
    waiting = [make_sequence([1], 1) for _ in range(5)]
    admission.admit(waiting, 0.0)
    admission.arrived(waiting, dict.fromkeys(waiting, 1))
    with pytest.raises(QueueFull):
        admission.admit([make_sequence([1], 1)], 0.0)
    assert admission.admit([make_sequence([1], 1, tenant="other")], 0.0)
    assert admission.admit([make_sequence([1] * 50, 1, priority=-1)], 0.0)
    assert admission.excess(7, 57, free=0) == (2, 0)
    with pytest.raises(QueueFull, match="7 requests"):
        admission.admit([make_sequence([1], 1) for _ in range(3)], 0.0)


def test_an_earlier_class_fills_no_more_than_half_of_the_queue_for_others() -> None:
    """Else who has the right to go first could keep all others out."""
    admission = full(max_requests=10)
    admission.update(queue_of(10, "first", priority=-1000), 0, 2, now=0.0)
    for number in range(4):
        assert admission.admit([make_sequence([1], 1, tenant=f"other {number}", priority=1000)], 0.0)
    admission = full(max_requests=10)
    admission.update(queue_of(5, "first", priority=-1000) | queue_of(5, "second"), 0, 2, now=0.0)
    with pytest.raises(QueueFull):
        admission.admit([make_sequence([1], 1, tenant="late", priority=1)], 0.0)
    assert admission.admit([make_sequence([1], 1, tenant="early")], 0.0), "second's queue is the longer one"


def test_one_huge_prompt_that_waits_does_not_keep_others_out() -> None:
    admission = Admission(max_requests=10, max_tokens=1000, slots=1, unit=100)
    admission.update({make_sequence([1] * 1000, 1, tenant="huge"): 1}, 0, 1, now=0.0)
    assert admission.admit([make_sequence([1] * 50, 1, tenant="small")], 0.0)
    with pytest.raises(QueueFull, match="1050 prompt tokens"):
        admission.admit([make_sequence([1] * 50, 1, tenant="huge")], 0.0)


def test_a_wait_behind_an_earlier_class_is_foreseen_to_be_no_longer_than_patience_allows() -> None:
    admission = Admission(max_requests=1000, max_tokens=10**6, slots=1, patience=30.0)
    admission.update(queue_of(500, "first", priority=-1000), 0, 1, now=0.0)
    for second in range(1, 40):
        admission.update({}, 0, 1 + second, now=float(second))
    assert admission.expected_wait(1, (-1000, "first")) == pytest.approx(501, rel=0.1)
    assert admission.expected_wait(1, (0, "other")) == pytest.approx(32, rel=0.1)
    assert admission.expected_wait(1, (-1000, "other")) == pytest.approx(2, rel=0.1)
    admission.admit([make_sequence([1], 1, tenant="other", deadline=39.0 + 40.0)], 39.0)


class Counted(dict[int, dict[str, None]]):
    """Counts the entries that are looked at."""

    looks = 0

    def __iter__(self) -> Iterator[int]:
        for item in super().__iter__():
            Counted.looks += 1
            yield item

    def items(self) -> Any:
        for item in super().items():
            Counted.looks += 1
            yield item


def test_no_request_is_compared_with_all_tenants_that_wait() -> None:
    admission = Admission(max_requests=100_000, max_tokens=10**9, slots=1, patience=30.0)
    waiting = {make_sequence([1], 1, tenant=f"@{number}", priority=number % 3): 1 for number in range(50_000)}
    admission.update(waiting, 0, 1, now=0.0)
    admission.update({}, 0, 2, now=1.0)
    backlog = admission._backlog
    for lengths in (backlog._tenant_counts, backlog._tenant_sizes, *backlog._counts.values(), *backlog._sizes.values()):
        lengths._with = Counted(lengths._with)
    for number in range(100):
        admission.admit([make_sequence([1], 1, tenant=f"late {number}", deadline=10.0**9)], 1.0)
        admission._backlog.gives_way((2, f"@{number}"), 1)
        assert admission._backlog.yielding((0, f"@{number}")) is not None
    assert 0 < Counted.looks < 100 * 50


@given(
    st.lists(
        st.tuples(st.integers(-1, 2), st.sampled_from("abcd"), st.integers(0, 30), st.booleans()),
        max_size=40,
    ),
    st.integers(-1, 2),
    st.sampled_from("abcd"),
    st.integers(1, 5),
)
def test_the_backlog_says_what_counting_all_of_it_says(
    changes: list[tuple[int, str, int, bool]], priority: int, tenant: str, more: int
) -> None:
    backlog, waiting = Backlog(unit=10), list[Sequence]()
    for level, other, tokens, leaves in changes:
        if leaves and waiting:
            backlog.remove(waiting.pop(tokens % len(waiting)))
        else:
            waiting.append(make_sequence([1] * tokens, 1, tenant=other, priority=level))
            backlog.add(waiting[-1])
    assert (len(backlog), backlog.tokens) == (len(waiting), sum(len(s.prompt) for s in waiting))
    counts = Counter(s.queue_key for s in waiting)
    own = counts[priority, tenant] + more
    ahead = sum(n for (p, _), n in counts.items() if p < priority)
    ahead += sum(min(n, own) for (p, t), n in counts.items() if p == priority and t != tenant)
    assert backlog.ahead((priority, tenant), more) == ahead + own
    tenants = Counter(s.tenant for s in waiting)
    own = tenants[tenant] + more
    assert backlog.ahead_of_tenant(tenant, more) == own + sum(min(n, own) for t, n in tenants.items() if t != tenant)

    sizes, all_sizes = Counter[tuple[int, str]](), Counter[str]()
    for sequence in waiting:
        sizes[sequence.queue_key] += 1 + len(sequence.prompt) // 10
        all_sizes[sequence.tenant] += 1 + len(sequence.prompt) // 10
    halves = [t for t, size in all_sizes.items() if 2 * size > all_sizes.total() and t != tenant]
    gives_way = any(size >= more for (p, _), size in sizes.items() if p > priority)
    gives_way |= any(
        size >= sizes[priority, tenant] + 2 * more for (p, t), size in sizes.items() if p == priority and t != tenant
    )
    gives_way |= any(all_sizes[t] >= all_sizes[tenant] + 2 * more for t in halves)
    assert backlog.gives_way((priority, tenant), more) == gives_way
    yielding = backlog.yielding((priority, tenant))
    if not waiting:
        assert yielding is None
        return
    assert yielding is not None
    last = max(p for p, _ in sizes)
    if last <= priority and halves:
        assert yielding == (max(p for p, t in sizes if t == halves[0]), halves[0])
    else:
        assert yielding[0] == last
        assert sizes[yielding] == max(size for (p, _), size in sizes.items() if p == last)
