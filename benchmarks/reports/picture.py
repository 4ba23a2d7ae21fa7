"""Draws the picture of the README, tokens/s against the baselines, from a folder of results.

    python -m benchmarks.reports.picture  # of this machine's folder
    python -m benchmarks.reports.picture --results folder --out elsewhere.svg

Every number in it is one of `server.json`; its axis says where and when that was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, plots
from benchmarks.report import suite_folder

SERVER = "server.json"
SYSTEMS = {
    "server": "this server",
    "static": "static batches, same kernels",
    "one_at_a_time": "one at a time, same kernels",
    "dense": "continuous batching, dense states",
    "upstream": "one at a time, upstream's generate",
}


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Draws what `benchmarks.server.throughput` reported; varying lengths only where it has measured them."""
    against, machine = report["against"], report["machine"]
    panels = {f"{against['streams']} streams, completions of {against['answer_tokens']} tokens": bars(against)}
    if heavy := report.get("heavy_tailed"):
        lengths = heavy["answer_tokens"]
        title = f"{heavy['streams']} streams, lengths vary: median {lengths['median']} tokens, longest {lengths['max']}"
        panels[title] = bars(heavy)
    where = f"{machine['cpu']}, {machine['threads']} threads, {report['date']}"
    plots.panels(file, f"tokens/s over HTTP ({where})", panels)


def bars(scenario: Mapping[str, Any]) -> Mapping[str, float]:
    """Tokens/s by the name of the system under test, as far as the scenario has it."""
    systems = scenario["sides"]
    return {name: systems[system]["tokens_per_s"]["value"] for system, name in SYSTEMS.items() if system in systems}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.reports.picture",
    )
    parser.add_argument("--results", type=Path, default=suite_folder())
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "throughput.svg")
    chosen = parser.parse_args(argv)
    if not (file := chosen.results / SERVER).is_file():
        parser.error(f"--results {chosen.results}: has no {SERVER}; `make bench` makes it")
    draw(json.loads(file.read_text("utf-8")), chosen.out)


if __name__ == "__main__":
    main()
