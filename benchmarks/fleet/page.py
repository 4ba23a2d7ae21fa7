"""Draws the pictures of docs/fleets.md, and writes its tables, from what the simulation found.

    python -m benchmarks.fleet.page                 # of the folder that the page links to
    python -m benchmarks.fleet.page --results folder --out elsewhere

A table stands between `<!-- fleet: SECTION -->` and `<!-- end of fleet -->`. Its numbers are those of `fleet.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT, plots
from benchmarks.report import RESULTS

RESULT, PAGE = "fleet.json", "fleets.md"
TABLE = re.compile(r"(<!-- fleet: ([a-z]+) -->\n).*?(<!-- end of fleet -->)", re.DOTALL)

Report = Mapping[str, Any]
Fleets = Sequence[Mapping[str, Any]]
Rows = Iterator[Sequence[object]]


def by_rule(fleets: Fleets, x: str, value: Callable[[Mapping[str, Any]], float]) -> dict[str, plots.Line]:
    """A line for each routing rule, over what the fleets differ in."""
    rules = dict.fromkeys(fleet["rule"] for fleet in fleets)
    own = {rule: [fleet for fleet in fleets if fleet["rule"] == rule] for rule in rules}
    return {rule: ([each[x] for each in of], [value(each) for each in of]) for rule, of in own.items()}


def draw(report: Report, folder: Path) -> None:
    """Waits and recomputed tokens, by the size of the fleet and by failures."""
    sizes, failures = report["sizes"], report["failures"]
    rate = f"{sizes['fleets'][0]['failures_per_hour']:g} failures an hour of each"
    size = f"{failures['fleets'][0]['replicas']} replicas"
    for report_of, name, x, x_label, what in (
        (sizes, "fleets", "replicas", "replicas", rate),
        (failures, "fleets-failures", "failures_per_hour", "failures an hour of each replica", size),
    ):
        fleets, log_x = report_of["fleets"], x == "replicas"
        title = f"Seconds to the first token, p99; load {report_of['load']:g}, {what}"
        slowest = by_rule(fleets, x, lambda fleet: float(fleet["first_token_s"]["p99"]))
        plots.lines(folder / f"{name}-waits.svg", title, x_label, "seconds", slowest, log_y=True, log_x=log_x)
        title = f"Tokens computed again in an hour; {what}"
        again = by_rule(fleets, x, lambda fleet: max(per_hour(fleet), 1.0))  # none has a point on the logarithmic axis
        plots.lines(folder / f"{name}-recomputed.svg", title, x_label, "tokens", again, log_y=log_x, log_x=log_x)


def per_hour(fleet: Mapping[str, Any]) -> float:
    return 3600 * float(fleet["recomputed_tokens"]) / float(fleet["seconds"])


def each_loss(fleet: Mapping[str, Any]) -> str:
    """Tokens recomputed for one lost replica."""
    return f"{fleet['recomputed_tokens'] / fleet['failures']:,.0f}" if fleet["failures"] else ""


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def waits(fleet: Mapping[str, Any]) -> str:
    found = fleet["first_token_s"]
    return f"{seconds(found['p50'])}, {seconds(found['p99'])}"


def pauses(fleet: Mapping[str, Any]) -> str:
    found = fleet["pause_s"]
    return f"{seconds(found['p50'])}, {seconds(found['p99'])}" if found["p50"] is not None else ""


def share(value: float) -> str:
    return f"{100 * value:.3g} %"


def sizes(fleets: Fleets) -> Rows:
    """A row for each rule of each size."""
    yield ["replicas", "rule", "first token", "computed", "requests", "tokens again in an hour"]
    for fleet in fleets:
        computed = share(fleet["computed_share_of_prompts"])
        amounts = f"{fleet['requests']:,}", f"{per_hour(fleet):,.0f}"
        yield [f"{fleet['replicas']:,}", fleet["rule"], waits(fleet), computed, *amounts]


def failures(fleets: Fleets) -> Rows:
    """A row for each rule of each rate."""
    yield [
        "failures an hour of each",
        "rule",
        "lost replicas",
        "first token",
        "pause",
        "tokens again, each loss",
        "of all work",
    ]
    for fleet in fleets:
        each = (each_loss(fleet), share(fleet["recomputed_share"]))
        rate = f"{fleet['failures_per_hour']:g}"
        yield [rate, fleet["rule"], fleet["failures"], waits(fleet), pauses(fleet), *each]


def detection(fleets: Fleets) -> Rows:
    yield ["seconds until a loss is known", "first token", "pause"]
    for fleet in fleets:
        yield [f"{fleet['detected']:g}", waits(fleet), pauses(fleet)]


def ingresses(fleets: Fleets) -> Rows:
    yield ["ingress processes", "turns of a conversation come to", "first token", "computed"]
    for fleet in fleets:
        where = "one" if fleet["sticky"] else "any"
        yield [fleet["ingresses"], where, waits(fleet), share(fleet["computed_share_of_prompts"])]


TABLES: Mapping[str, Callable[[Fleets], Rows]] = {
    "sizes": sizes,
    "failures": failures,
    "detection": detection,
    "ingresses": ingresses,
}


def table(rows: Rows) -> str:
    head, *others = ([str(cell) for cell in row] for row in rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def rewritten(page: str, report: Report) -> str:
    """The page with the tables of a report."""

    def of(found: re.Match[str]) -> str:
        begin, section, end = found.groups()
        return begin + "\n" + table(TABLES[section](report[section]["fleets"])) + "\n" + end

    return TABLE.sub(of, page)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.fleet.page",
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "amd-epyc-2-threads")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pictures and of fleets.md")
    chosen = parser.parse_args(argv)
    if not (file := chosen.results / RESULT).is_file():
        parser.error(f"--results {chosen.results}: has no {RESULT}; `python -m benchmarks.fleet.sweep` makes it")
    report = json.loads(file.read_text("utf-8"))
    if missing := [section for section in TABLES if section not in report]:
        parser.error(f"--results {file}: has no {missing[0]}; `python -m benchmarks.fleet.sweep` makes all")
    draw(report, chosen.out)
    page = chosen.out / PAGE
    page.write_text(rewritten(page.read_text("utf-8"), report), "utf-8")


if __name__ == "__main__":
    main()
