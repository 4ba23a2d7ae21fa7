"""The page of the policy: how long that is, and its guards: each is told, and has a figure that is worse without it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bdh_batch.scheduler.policy import Guards
from benchmarks.engine.scenarios import GUARDED, SCENARIOS, play_scenarios, play_without

PAGE = Path(__file__).parents[2] / "docs" / "scheduling.md"


def test_the_policy_is_no_longer_than_the_page_says() -> None:
    """Runs the script of the page: it names the files that are counted."""
    page = PAGE.read_text()
    counted = re.search(r"^python - (\S+)/\{(\S+)\}\.py <<'END'\n(.+?)^END$", page, re.DOTALL | re.MULTILINE)
    most = re.search(r"are at most (\d+)\.", page)
    assert counted is not None
    assert most is not None
    folder, names, script = counted.groups()
    files = [str(PAGE.parents[1] / folder / f"{name}.py") for name in names.split(",")]
    done = subprocess.run([sys.executable, "-", *files], input=script, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= int(most[1])


def test_every_guard_is_told_with_its_scenario() -> None:
    page = PAGE.read_text()
    assert {each.name for each in fields(Guards)} == set(GUARDED)
    for guard, scenarios in GUARDED.items():
        assert f"`{guard}`" in page
        assert all(scenario in SCENARIOS and scenario in page for scenario in scenarios)


@pytest.mark.parametrize(
    ("guard", "figures"), [("awaits", ["ratio"]), ("alternate", ["gap_s", "p99"]), ("little", ["seconds"])]
)
def test_a_figure_is_worse_without_its_guard(guard: str, figures: list[str]) -> None:
    """The quick ones; `benchmarks.engine.simulate --without` plays all."""
    scenario = GUARDED[guard][0]

    def figure(report: dict[str, dict[str, Any]]) -> float:
        found: Any = report[scenario]
        for name in figures:
            found = found[name]
        return float(found)

    assert figure(play_without(guard)) > 1.2 * figure(play_scenarios([scenario]))
