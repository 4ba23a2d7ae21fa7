"""Steps that somebody looks at: who is in them, who waits, and why."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bdh_batch.engine.steps import RECORDINGS, SHOWN, StepRecordings, describe_step
from bdh_batch.engine.worker import Worker
from bdh_batch.errors import Unavailable
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from tests.scheduler.fakes import FakeObserver, FakeRunner, make_sequence


def described(scheduler: Scheduler, runner: FakeRunner) -> Any:
    """The next step, which is then computed."""
    step = scheduler.plan(0.0)
    assert step is not None
    record = describe_step(step, scheduler)
    scheduler.commit(step, runner.run(step.plan), 0.0)
    return record


def reasons(record: Any) -> dict[str, str]:
    return {each["request"]: each["reason"] for each in record["waiting"]}


def test_a_step_has_its_members_and_why_the_others_are_not() -> None:
    policy = Policy(host_slots=2, max_running=3, time_slice=2, cache_prefixes=True, min_shared=4)
    scheduler, runner = Scheduler(slots=2, prefill_tokens=16, policy=policy), FakeRunner()
    scheduler.submit([make_sequence([1] * 40, 50, name="first", tenant="a")])
    record = described(scheduler, runner)
    (first,) = record["sequences"]
    assert (first["request"], first["tenant"], first["phase"]) == ("first", "a", "prompt")
    assert (first["tokens"], first["position"], record["prompt_tokens"]) == (16, 0, 16)
    scheduler.submit([make_sequence([1] * 30 + [2] * 30, 50, name="alike", tenant="a")])
    assert reasons(described(scheduler, runner)) == {"alike": "prefix"}
    scheduler.submit([make_sequence([number] * 9, 50, name=f"{number}", tenant="a") for number in range(3, 7)])
    seen: set[str] = set()
    for _ in range(12):
        record = described(scheduler, runner)
        assert len(record["sequences"]) <= record["slots"] == 2
        assert record["waiting_total"] == len(record["waiting"]) == 6 - len(record["sequences"])
        seen |= set(reasons(record).values())
    assert {"max_running", "preempted"} <= seen


def test_of_a_crowd_the_first_are_shown() -> None:
    scheduler, runner = Scheduler(slots=1, prefill_tokens=16), FakeRunner()
    scheduler.submit([make_sequence([1] * (number % 7 + 1), 9, name=str(number)) for number in range(1, 3000)])
    record = described(scheduler, runner)
    assert (len(record["waiting"]), record["waiting_total"]) == (SHOWN, 2998)
    assert set(reasons(record).values()) == {"max_running"}


async def test_a_recording_has_the_next_steps_and_whether_they_failed() -> None:
    runner = FakeRunner()
    worker = Worker(Scheduler(slots=1, prefill_tokens=16), runner, FakeObserver(), max_queued=10)
    try:
        runner.fail_next = True
        recording = asyncio.create_task(worker.record_steps(2, 300.0))
        await asyncio.sleep(0)
        worker.submit([make_sequence([1], 1, name="lost")])
        worker.submit([make_sequence([1], 3, name="kept")])
        steps = await recording
        assert [step["error"] for step in steps] == ["RuntimeError", None]
        assert all(isinstance(step["seconds"], float) and step["seconds"] >= 0 for step in steps)
        others = [asyncio.create_task(worker.record_steps(1, 300.0)) for _ in range(RECORDINGS)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await worker.record_steps(1, 300.0)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert await worker.record_steps(1, 0.0) == []
    finally:
        worker.close()


async def test_a_recording_whose_last_step_has_come_is_whole_though_another_begins_before_it_is_returned() -> None:
    recordings = StepRecordings(Scheduler(slots=1, prefill_tokens=16))
    first = asyncio.create_task(recordings.record(1, 300.0))
    await asyncio.sleep(0)
    recordings.ended({"step": 1}, 0.5)
    second = asyncio.create_task(recordings.record(1, 300.0))  # runs before the first is woken
    assert [each["step"] for each in await first] == [1]
    recordings.ended({"step": 2}, 0.5)
    assert [each["step"] for each in await second] == [2]
