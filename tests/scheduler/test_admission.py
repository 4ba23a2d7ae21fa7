from __future__ import annotations

from collections import Counter

import pytest

from bdh_batch.errors import InvalidRequest, QueueFull, TooLate
from bdh_batch.scheduler.admission import LONGEST_RETRY, Admission
from tests.scheduler.fakes import make_sequence


def full(max_requests: int = 5, max_tokens: int = 100) -> Admission:
    """Two places, both taken."""
    admission = Admission(max_requests, max_tokens, places=2)
    admission.update(Counter(), 0, 0, 2, now=0.0)
    return admission


def test_requests_that_wait_are_bounded() -> None:
    admission = full()
    for _ in range(5):
        admission.admit([make_sequence([1], 1)], 0.0)
    with pytest.raises(QueueFull, match="5 requests"):
        admission.admit([make_sequence([1], 1)], 0.0)
    admission.update(Counter(), 0, 2, 4, now=1.0)
    assert admission.queued == 5  # the inbox has not been taken yet


def test_tokens_that_wait_are_bounded() -> None:
    admission = full()
    admission.admit([make_sequence([1] * 60, 1)], 0.0)
    with pytest.raises(QueueFull, match="60 prompt tokens"):
        admission.admit([make_sequence([1] * 41, 1)], 0.0)
    admission.admit([make_sequence([1] * 40, 1)], 0.0)


def test_a_long_prompt_that_need_not_wait_is_let_in() -> None:
    Admission(5, 100, places=2).admit([make_sequence([1] * 1000, 1)], 0.0)


def test_more_than_could_ever_run_and_wait_is_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match="7 answers"):
        full().admit([make_sequence([1], 1) for _ in range(8)], 0.0)


def test_all_of_a_request_or_nothing() -> None:
    admission = full()
    with pytest.raises(QueueFull):
        admission.admit([make_sequence([1], 1) for _ in range(6)], 0.0)
    assert admission.queued == 0


def busy() -> Admission:
    """Ten wait, and a place is given out every two seconds."""
    admission = full(max_requests=20, max_tokens=1000)
    for second in range(1, 40):
        admission.update(Counter({(0, ""): 10}), 10, 0, 2 + second // 2, now=float(second))
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


def test_no_one_is_told_to_wait_for_ever() -> None:
    admission = busy()
    admission.update(Counter({(0, ""): 20}), 20, 0, 21, now=10_000.0)
    with pytest.raises(QueueFull) as refusal:
        admission.admit([make_sequence([1], 1)], 10_000.0)
    assert 1 <= refusal.value.retry_after <= LONGEST_RETRY


def test_a_crowd_that_is_refused_comes_back_no_faster_than_places_are_given() -> None:
    admission = busy()
    comes = [0.0] * 30  # so many, a place a second: each comes again when it was told to
    refused = []
    for second in range(40, 400):
        admission.update(Counter({(0, ""): 20}), 20, 0, second, now=float(second))
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
    admission = busy()
    request = make_sequence([1], 1)
    request.deadline = 50.0
    with pytest.raises(QueueFull, match="longer than the request may take"):
        admission.admit([request], 40.0)
    for second in range(40, 80):  # every place is taken, but nobody waits for one
        admission.update(Counter(), 0, 0, second, now=float(second))
    request.deadline = 90.0
    admission.admit([request], 80.0)


def test_tokens_that_could_never_wait_are_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match="100 prompt tokens"):
        full().admit([make_sequence([1] * 40, 1) for _ in range(3)], 0.0)


def test_another_key_does_not_wait_behind_a_whole_line() -> None:
    admission = busy()
    assert admission.expected_wait(1, (0, "other")) == pytest.approx(4.0, rel=0.1)  # one of the line, and itself
    admission.admit([make_sequence([1], 1, key="other", deadline=39.0 + 10.0)], 39.0)


def test_one_that_makes_another_give_way_need_not_wait() -> None:
    admission = busy()
    admission.update(Counter({(0, ""): 10}), 10, 0, 21, now=40.0, last_class=0)
    assert admission.expected_wait(1, (-1, "")) == 0.0
    assert admission.expected_wait(1, (0, "")) > 20.0


def test_a_full_queue_is_full_for_those_who_fill_it() -> None:
    admission = full()
    waiting = [make_sequence([1], 1) for _ in range(5)]
    admission.admit(waiting, 0.0)
    admission.arrived(waiting)
    with pytest.raises(QueueFull):
        admission.admit([make_sequence([1], 1)], 0.0)
    assert admission.admit([make_sequence([1], 1, key="other")], 0.0)
    assert admission.admit([make_sequence([1] * 50, 1, priority=-1)], 0.0)
    assert admission.excess(7, 57, free=0) == (2, 0)
    with pytest.raises(QueueFull):
        admission.admit([make_sequence([1], 1, priority=1, key="late")], 0.0)
    with pytest.raises(QueueFull, match="7 requests"):
        admission.admit([make_sequence([1], 1) for _ in range(3)], 0.0)
