"""What got slower from one folder of results to another, beyond the noise.

    python -m benchmarks.compare benchmarks/results/amd-epyc-2-threads /tmp/new
    python -m benchmarks.compare A B --least 0.1         # what is slower by less than a tenth is no matter

Looks at every figure (`common.figure`) that both folders have. Where both have as many rounds, rounds of the same
number are pairs, as a run is slow and fast at the same places, and are drawn again as pairs; where they do not, the
spread of the ratio follows from both intervals, as normal ones. What is worse by more than `--least` at each place of
the interval that holds 95 % is a regression, and the exit code is 1. 2 is for folders with no figure in common.

For two runs of one machine: the measure is time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Ratio, ratio

KEYS = {"value", "low", "high", "unit", "better"}
Figure = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """`ratio` is how many times as bad B is as A, whichever way is worse: above 1 is slower."""

    name: str
    before: Figure
    after: Figure
    ratio: Ratio

    def verdict(self, least: float) -> str:
        if self.ratio.low > 1 + least:
            return "slower"
        return "faster" if self.ratio.high < 1 / (1 + least) else "the same"


def figures(folder: Path) -> dict[str, Figure]:
    """Every figure of a folder's files, by where it lies: as in server/against/sides/static/tokens_per_s."""
    found: dict[str, Figure] = {}
    for file in sorted(folder.glob("*.json")):
        found.update(within(file.stem, json.loads(file.read_text())))
    return found


def within(name: str, held: object) -> Iterator[tuple[str, Figure]]:
    if isinstance(held, dict):
        if held.keys() >= KEYS:
            yield name, held
            return
        for key, part in held.items():
            yield from within(f"{name}/{key}", part)
    elif isinstance(held, list):
        for number, part in enumerate(held):
            yield from within(f"{name}/{label(part, number)}", part)


def label(row: object, number: int) -> str:
    """A row of a list goes by what its first entry says, so that lists of other lengths can be compared."""
    if isinstance(row, dict) and row:
        key, value = next(iter(row.items()))
        if isinstance(value, int | float | str):
            return f"{key}={value}"
    return str(number)


def compare(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> list[Change]:
    """Of the figures that both have and that mean the same."""
    return [
        Change(name, before[name], after[name], worse(before[name], after[name]))
        for name in before
        if name in after and all(before[name][key] == after[name][key] for key in ("unit", "better"))
    ]


def worse(before: Figure, after: Figure) -> Ratio:
    upper, lower = (after, before) if before["better"] == "lower" else (before, after)
    rounds = [each.get("rounds", ()) for each in (upper, lower)]
    if len(rounds[0]) == len(rounds[1]) > 1:
        return ratio(*rounds)
    return of_intervals(upper, lower)


def of_intervals(upper: Figure, lower: Figure) -> Ratio:
    """On the scale of logarithms, where a ratio is a difference."""
    value = upper["value"] / lower["value"]
    spread = math.hypot(*(half_width(each) for each in (upper, lower)))
    return Ratio(value, value * math.exp(-spread), value * math.exp(spread))


def half_width(figure: Figure) -> float:
    return math.log(figure["high"] / figure["low"]) / 2


def table(changes: Sequence[Change], least: float) -> Iterator[str]:
    """What changed, the worst first, and how much is as it was."""
    told = [change for change in changes if change.verdict(least) != "the same"]
    for change in sorted(told, key=lambda change: -change.ratio.value):
        by = f"{change.ratio.value:.3f} ({change.ratio.low:.3f} to {change.ratio.high:.3f}) times as slow"
        values = f"{change.before['value']:,.4g} → {change.after['value']:,.4g} {change.before['unit']}"
        yield f"{change.verdict(least)}: {change.name}: {values}, {by}"
    yield f"{len(changes) - len(told)} of {len(changes)} figures are the same within the noise."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.compare"
    )
    parser.add_argument("before", type=Path, metavar="A", help="a folder of results")
    parser.add_argument("after", type=Path, metavar="B", help="another one, of the same machine")
    parser.add_argument("--least", type=float, default=0.05, help="slower by this share is no matter")
    chosen = parser.parse_args(argv)
    if chosen.least < 0:
        parser.error("--least should not be below 0")
    changes = compare(figures(chosen.before), figures(chosen.after))
    if not changes:
        print(f"{chosen.before} and {chosen.after} have no figure in common.", file=sys.stderr)
        return 2
    print("\n".join(table(changes, chosen.least)))
    return int(any(change.verdict(chosen.least) == "slower" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
