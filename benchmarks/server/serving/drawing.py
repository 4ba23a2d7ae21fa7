"""The plots of the scenarios, from their report."""

from __future__ import annotations

from pathlib import Path

from benchmarks.plots import bars, lines
from benchmarks.server.serving.common import Figures


def draw_gaps(folder: Path, scenario: Figures) -> None:
    used = (row for row in scenario["by_target"] if row["used_before"])
    rows = sorted(used, key=lambda row: float(row["target_step_ms"]))
    targets = [row["target_step_ms"] for row in rows]
    data = {name: (targets, [row[f"{name}_p99_gap_ms"] for row in rows]) for name in ("without", "beside")}
    title = f"{scenario['streams']} streams, and a prompt of {scenario['prompt_tokens']:,} tokens"
    lines(folder / "serving-gaps.svg", title, "scheduler.target_step_ms", "p99 gap between tokens, ms", data)


def draw_fairness(folder: Path, scenario: Figures) -> None:
    series = {
        f"{name}, max_running {row['max_running']}": row[key]
        for row in scenario["by_max_running"]
        for name, key in (("alone", "figure_alone"), ("beside the flood", "figure"))
    }
    title = f"One request at a time, and another tenant with {scenario['flood']} at once"
    values = {name: each["value"] for name, each in series.items()}
    notes = {name: f"{each['low']:.0f} to {each['high']:.0f}" for name, each in series.items()}
    bars(folder / "serving-fairness.svg", title, "ms to the first token, median", values, notes)


def draw(folder: Path, report: Figures) -> None:
    for name, drawing in {"prompt": draw_gaps, "keys": draw_fairness}.items():
        if name in report:
            drawing(folder, report[name])
