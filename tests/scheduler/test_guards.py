"""The guards of the rank: each is documented, and has a figure that is worse without it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bdh_batch.scheduler.policy import Guards
from benchmarks.engine.scenarios import GUARDED, SCENARIOS, play_scenarios, play_without

PAGE = Path(__file__).parents[2] / "docs" / "scheduling.md"


def test_every_guard_is_told_with_its_scenario() -> None:
    page = PAGE.read_text()
    assert {each.name for each in fields(Guards)} == set(GUARDED)
    for guard, scenarios in GUARDED.items():
        assert f"`{guard}`" in page
        assert all(scenario in SCENARIOS and scenario in page for scenario in scenarios)


@pytest.mark.parametrize(("guard", "figures"), [("alternate", ["gap_s", "p99"]), ("little", ["seconds"])])
def test_a_figure_is_worse_without_its_guard(guard: str, figures: list[str]) -> None:
    """The quick ones; `benchmarks.engine.simulate --without` plays all."""
    scenario = GUARDED[guard][0]

    def figure(report: dict[str, dict[str, Any]]) -> float:
        found: Any = report[scenario]
        for name in figures:
            found = found[name]
        return float(found)

    assert figure(play_without(guard)) > 1.2 * figure(play_scenarios([scenario]))
