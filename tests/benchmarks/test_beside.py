"""The benchmark of steps beside a busy loop measures both, and says by how much they differ."""

from __future__ import annotations

import json

import pytest

from benchmarks.engine import beside


def test_a_round_measures_steps_alone_and_beside_the_loop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "ALONE", 0.02)
    monkeypatch.setattr(beside, "BESIDE", 0.02)
    beside.main(["--batches", "1", "2", "--print-only"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"1", "2"}
    assert all(each["alone"] > 0 and each["beside"] > 0 for each in found.values())


def test_ratios_are_those_of_the_medians() -> None:
    now = [{"8": {"alone": 2.0, "beside": 3.0}}] * 3
    before = [{"8": {"alone": 2.0, "beside": 6.0}}] * 3
    assert beside.summary(now)["8"]["beside / alone"]["value"] == 1.5
    found = beside.speed_ups({"now": now, "before": before})["8"]
    assert (found["alone"]["value"], found["beside"]["value"]) == (1, 2)
