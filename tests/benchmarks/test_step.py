from __future__ import annotations

import pytest

from benchmarks.engine.step import KINDS, one_round, summary


def test_the_parts_of_a_step_are_all_of_it() -> None:
    found = one_round([2], steps=20)
    assert set(found) == {f"2 {kind}" for kind in KINDS}
    for each in found.values():
        assert set(each) == {"plan", "run", "forward", "logits", "commit", "publish", "all", "around"}
        assert all(us > 0 for us in each.values())
    report = summary([found, {name: {part: 2 * us for part, us in each.items()} for name, each in found.items()}])
    for name, each in found.items():
        assert report[name]["us"]["plan"] == pytest.approx(1.5 * each["plan"], abs=0.01)
        assert report[name]["around"]["rounds"] == [each["around"], 2 * each["around"]]
