"""A trace shows what was asked and decided, not what was said; and can be played again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdh_batch.engine.trace import BLOCK, Trace
from bdh_batch.scheduler.prefixes import common, pack
from bdh_batch.scheduler.scheduler import Scheduler
from benchmarks.engine.play import Cost
from benchmarks.engine.simulate import POLICIES, generate, replay, simulate
from tests.scheduler.fakes import FakeRunner, make_sequence


def record(file: Path) -> None:
    scheduler, runner, trace, now = Scheduler(2, 32), FakeRunner(), Trace(file), 0.0
    for number in range(6):
        sequences = [make_sequence([*range(40), 100 + number], 3 + number, tenant=f"k{number % 2}")]
        scheduler.submit(sequences)
        trace.submitted(sequences, now)
    while (step := scheduler.plan(now)) is not None:
        now += 0.01
        updates = scheduler.commit(step, runner.run(step.plan), now)
        trace.stepped(step, now)
        trace.updated(updates, now)
    trace.close()


def test_a_trace_can_be_played_again(tmp_path: Path) -> None:
    record(tmp_path / "trace")
    requests = replay(tmp_path / "trace")
    assert [(len(request.prompt), request.completion_tokens) for request in requests] == [
        (41, 3 + number) for number in range(6)
    ]
    assert common(pack(requests[0].prompt), pack(requests[1].prompt)) == 40 // BLOCK * BLOCK
    for policy in POLICIES:
        result = simulate(policy, requests, Cost(), slots=2, prefill=32, host=2)
        assert result["tokens_per_s"]


def test_steps_tell_what_was_computed(tmp_path: Path) -> None:
    record(tmp_path / "trace")
    events = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert sum(step["decodes"] for step in steps) == sum(2 + number for number in range(6))
    assert all(abs(step["seconds"] - 0.01) < 1e-9 for step in steps)


def test_fair_shares_serve_small_keys_sooner_than_first_come_first_served() -> None:
    requests = generate(1500, 1.0, Cost(), 16, seed=3)
    p90 = {}
    for policy in POLICIES:
        waits = simulate(policy, requests, Cost(), slots=16, prefill=256, host=16)["first_token_s_of_small_keys"]
        assert isinstance(waits, dict)
        p90[policy] = waits["p90"]
    assert p90["fair"] < p90["fcfs"] < p90["static"]


def test_a_trace_that_cannot_be_written_ends_and_nothing_else_does(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(Path("/dev/full"))
    many = [make_sequence([1] * 64, 1) for _ in range(2000)]
    trace.submitted(many, 0.0)
    trace.submitted(many, 1.0)
    trace.close()
    assert caplog.text.count("the trace ends here") == 1
