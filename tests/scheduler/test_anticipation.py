"""Waiting between two steps for a tenant that is about to ask again."""

from __future__ import annotations

from bdh_batch.messages import Outcome
from bdh_batch.scheduler.anticipation import KNOWN, MOST, MOST_IN_VAIN, Anticipation
from bdh_batch.scheduler.policy import Guards, Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Sequence
from tests.scheduler.fakes import make_sequence

PART = 0.5
STEP = 1.0  # seconds


def come_and_go(anticipation: Anticipation, delay: float, now: float, goes_first: bool = True) -> tuple[float, float]:
    """The seconds that the next plan waits once a tenant's last sequence has ended, and when that one is back."""
    anticipation.left("lone", goes_first, STEP, now)
    back, until = now + delay, anticipation.until(now)
    assert anticipation.until(min(back, until)) == (until if back < until else min(back, until))
    anticipation.arrived("lone", back)
    assert anticipation.until(back) == back, "it is here"
    return min(until, back) - now, back


def test_who_came_back_within_a_step_is_waited_for() -> None:
    anticipation = Anticipation(PART)
    waited, now = come_and_go(anticipation, delay=0.9, now=100.0)
    assert not waited, "nothing is known of it"
    waited, now = come_and_go(anticipation, delay=0.25, now=now)
    assert waited == 0.25
    waited, now = come_and_go(anticipation, delay=0.25, now=now + 0.25 / MOST)
    assert waited == 0.25
    waited, now = come_and_go(anticipation, delay=0.75, now=now + 0.25 / MOST)
    assert waited == PART * STEP, "no longer, if it does not come"
    waited, now = come_and_go(anticipation, delay=0.25, now=now + 0.5 / MOST_IN_VAIN)
    assert not waited, "as it was late last time"
    waited, now = come_and_go(anticipation, delay=0.25, now=now, goes_first=False)
    assert not waited, "others would go before it"
    assert come_and_go(anticipation, delay=0.25, now=now)[0] == 0.25


def test_waiting_takes_a_bounded_part_of_the_time() -> None:
    for delay, most in ((0.25, MOST), (0.75, MOST_IN_VAIN)):
        anticipation, now, waited = Anticipation(PART), 0.0, 0.0
        for _ in range(2000):
            more, now = come_and_go(anticipation, delay, now)
            waited += more
        assert 0 < waited <= most * now + PART * STEP


def test_of_very_many_tenants_those_are_known_that_ended_last() -> None:
    anticipation = Anticipation(PART)
    for number in range(10 * KNOWN):
        anticipation.left(str(number), True, STEP, 0.0)
        anticipation.arrived(str(number), 0.5)
    anticipation.left("0", True, STEP, 1.0)
    assert anticipation.until(1.0) == 1.0
    anticipation.left(str(10 * KNOWN - 1), True, STEP, 1.0)
    assert anticipation.until(1.0) == 1.0 + PART * STEP
    assert len(anticipation._absences) == KNOWN


class Steps:
    """A scheduler on a clock on which each step takes a second."""

    def __init__(self, part: float = PART) -> None:
        self.scheduler = Scheduler(slots=8, prefill_tokens=16, policy=Policy(guards=Guards(awaits=part)))
        self.now = 0.0

    def ask(self, tenant: str, tokens: int, priority: int = 0) -> Sequence:
        sequence = make_sequence([1, 2], tokens, tenant=tenant, priority=priority)
        sequence.times.arrived = self.now
        self.scheduler.submit([sequence])
        return sequence

    def step(self) -> None:
        step = self.scheduler.plan(self.now)
        assert step is not None
        self.now += STEP
        outcome = Outcome([1 if segment.sampling else None for segment in step.plan.segments])
        self.scheduler.commit(step, outcome, self.now)

    def end(self, sequence: Sequence) -> float:
        """The seconds that the next plan waits once `sequence` has ended."""
        while sequence.finish_reason is None:
            self.step()
        return self.scheduler.anticipation.until(self.now) - self.now


def test_the_next_plan_waits_for_the_tenant_that_would_go_first_and_for_no_other() -> None:
    steps = Steps()
    for _ in range(4):
        steps.ask("flood", 1000)
    steps.step()
    assert not steps.end(steps.ask("lone", 2)), "nothing is known of it"
    other = steps.ask("lone", 30)
    assert not steps.end(steps.ask("lone", 2)), "it has something left"
    assert steps.end(other) == PART * STEP
    steps.ask("flood", 1000)
    assert steps.end(steps.ask("flood", 2)) == 0, "it has others"
    assert not steps.end(steps.ask("lone", 2, priority=1)), "an earlier priority runs"


def test_time_in_which_nothing_ran_was_not_waited() -> None:
    anticipation = Anticipation(PART)
    _, now = come_and_go(anticipation, delay=0.25, now=0.0)
    anticipation.left("lone", True, STEP, now)
    anticipation.arrived("lone", now + 3600.0)
    anticipation.left("lone", True, STEP, now + 3600.0)
    anticipation.arrived("lone", now + 3600.5)
    now += 3600.5 + PART * STEP / MOST
    assert come_and_go(anticipation, delay=0.25, now=now)[0] == 0.25


def test_nobody_is_waited_for_where_nothing_runs_or_it_is_off() -> None:
    idle, off = Steps(), Steps(part=0.0)
    off.ask("flood", 1000)
    for steps in (idle, off):
        for _ in range(3):
            assert not steps.end(steps.ask("lone", 2))
