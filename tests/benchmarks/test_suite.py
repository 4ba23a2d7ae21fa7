"""The suite: what is measured when, and what becomes of several repetitions; its parts have tests of their own."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.common import figure, interval
from benchmarks.reports import suite
from benchmarks.reports.compare import figures
from benchmarks.reports.pool import pooled
from tests.benchmarks.support import HEAD, write_json

VALUES = st.lists(st.floats(0.1, 1e6), min_size=2, max_size=8)


def repetition(value: float) -> dict[str, Any]:
    return {
        "command": f"at {value}",
        "batch": 8,
        "met": True,
        "rate": value,
        "rows": [{"size": 1, "figure": figure([0.9 * value, value, 9 * value], "tokens/s", "higher")}],
        "ratio": interval([value, value, 2 * value]),
    }


@settings(max_examples=20)
@given(VALUES)
def test_each_repetition_is_a_round(values: list[float]) -> None:
    found = pooled([repetition(value) for value in values])
    assert found["rows"] == [{"size": 1, "figure": figure(values, "tokens/s", "higher")}]
    assert found["ratio"] == interval(values)
    assert found["rate"] == statistics.median(values)
    assert (found["batch"], found["met"], found["command"]) == (8, True, f"at {values[-1]}")


def test_what_sat_once_is_as_it_was() -> None:
    assert pooled([repetition(5.0)]) == repetition(5.0)
    assert pooled([{"a": repetition(1.0)}, {"b": repetition(2.0)}]) == {"a": repetition(1.0), "b": repetition(2.0)}


@pytest.mark.parametrize(
    ("one", "other"),
    [({"met": True}, {"met": False}), ([1, 2], [1]), ({"a": {}}, {"a": 3}), ({"a": None}, {"a": 3})],
)
def test_what_is_of_other_measurements_is_refused(one: object, other: object) -> None:
    with pytest.raises(ValueError, match=r"repetitions differ|zip"):
        pooled([one, other])


def test_everything_sits_and_what_is_short_all_over_the_run() -> None:
    for quick in (True, False):
        planned = [*suite.repetitions(suite.PARTS, quick)]
        scenarios = [(each.part, each.flags[1]) for each in planned if each.flags[:1] == ["--only"]]
        assert scenarios == [*suite.SCENARIOS]
        assert {each.part for each in planned} == set(suite.PARTS)
        assert sum(each.part == "engine" for each in planned) == (2 if quick else len(scenarios))
    assert [each.part for each in suite.repetitions(["scheduler"], True)] == ["scheduler"] * 2


def test_a_run_leaves_one_report_of_its_repetitions_and_the_page(tmp_path: Path) -> None:
    of_others = {"commit": "abc", "quick": False, "seconds": 7}
    write_json(tmp_path / "found" / "suite.json", {"parts": {"engine": of_others, "scheduler": of_others}})
    arguments = ["--quick", "--only", "scheduler", "--results", str(tmp_path / "found"), "--page"]
    suite.main([*arguments, str(tmp_path / "page.md")])
    report = json.loads((tmp_path / "found" / "scheduler.json").read_text())
    found = figures({"scheduler": report})
    assert found
    assert all(len(each["rounds"]) == report["sittings"] == 2 for each in found.values())
    assert {file.name for file in (tmp_path / "found").iterdir()} == {"scheduler.json", "suite.json"}
    page = (tmp_path / "page.md").read_text()
    assert "## Scheduling" in page
    assert "its figures say nothing" in page
    parts = json.loads((tmp_path / "found" / "suite.json").read_text())["parts"]
    assert parts["engine"] == of_others
    assert parts["scheduler"]["quick"]
    assert f"commit abc and {parts['scheduler']['commit']}" in page


def test_plots_are_of_all_repetitions(tmp_path: Path) -> None:
    for number, value in enumerate((1000.0, 3000.0)):
        row = {"batch": 8, "tokens_per_s": value, "figure": figure([value], "tokens/s", "higher")}
        write_json(tmp_path / f"repetitions/{number:02}/engine-cpu.json", {**HEAD, "batches": [row]})
    suite.gather(tmp_path / "repetitions", tmp_path, "make bench")
    (row,) = json.loads((tmp_path / "engine-cpu.json").read_text())["batches"]
    assert row["tokens_per_s"] == row["figure"]["value"] == 2000.0
    assert (tmp_path / "engine-batches.svg").is_file()
    assert not (tmp_path / "repetitions").exists()


def test_a_part_that_fails_ends_the_run_and_leaves_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with 2"):
        suite.repeat(suite.Repetition("scheduler", ["--steps", "1"]), tmp_path / "00")
    assert "--steps should be at least" in (tmp_path / "00" / "log").read_text()
