"""What got slower from one folder of results to another, beyond the noise.

    python -m benchmarks.reports.compare benchmarks/results/amd-epyc-2-threads/suite /tmp/new
    python -m benchmarks.reports.compare A B --least 0.1  # what is slower by less than a tenth is no matter

Looks at every figure (`common.figure`) of the first folder, and at each part of a file as a whole, as what is slower
in many figures need not be beyond the noise of one. The rounds of both are compared by t intervals on the scale of
logarithms, whose variances lean on those of all figures, or all parts (`noise.py`). They are as wide as it takes for
all of them together to hold in 95 % of comparisons of runs that differ by noise alone, and it is given what loss they
would show. What drifts between two runs is in none of them, and is what `--least` is for. Of a figure without rounds,
the spread follows from both intervals, as normal ones.

What is worse by more than `--least` at each point of its interval is a regression, and the exit code is 1. So it is
where B lacks a figure that A has. 2 is for folders that cannot be compared: nothing in common, or one of them of a
quick run.

For two runs of one machine: the measure is time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from benchmarks.common import FIGURE, Ratio, figure
from benchmarks.reports.noise import SURE, each_share, ratios

Figure = Mapping[str, Any]
Figures = Mapping[str, Figure]
Reports = Mapping[str, Any]


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


def reports(folder: Path) -> Reports:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def figures(reports: Reports) -> Figures:
    """Every figure of a folder's files, by where it lies: as in server/against/sides/static/tokens_per_s."""
    found: dict[str, Figure] = {}
    for stem, report in reports.items():
        for name, each in within(stem, report):
            if name in found:
                raise ValueError(f"two figures would go by the name {name}")
            found[name] = each
    return found


def within(name: str, held: object) -> Iterator[tuple[str, Figure]]:
    if isinstance(held, dict):
        if held.keys() >= FIGURE:
            yield name, held
            return
        for key, part in held.items():
            yield from within(f"{name}/{key}", part)
    elif isinstance(held, list):
        for label, part in zip(labels(held), held, strict=True):
            yield from within(f"{name}/{label}", part)


def labels(rows: Sequence[object]) -> list[str]:
    """A row of a list goes by what its first entries say, so that lists of other lengths can be compared: by as many
    entries as distinguish all rows, and by its index where none do."""
    entries = [labels_of(row) for row in rows]
    for count in range(1, max(map(len, entries), default=0) + 1):
        found = [",".join(each[:count]) or str(number) for number, each in enumerate(entries)]
        if len(set(found)) == len(found):
            return found
    return [",".join([*each[:1], str(number)]) for number, each in enumerate(entries)]


def labels_of(row: object) -> list[str]:
    """The entries before the first that holds others, or that was measured, as a fraction after the first may be."""
    found: list[str] = []
    for key, value in row.items() if isinstance(row, dict) and not row.keys() >= FIGURE else ():
        if not isinstance(value, int | str) and not (isinstance(value, float) and not found):
            break
        found.append(f"{key}={value}")
    return found


def why_not(before: Figure, after: Figure) -> str | None:
    """What keeps two figures from being compared."""
    for key in ("unit", "better"):
        if before[key] != after[key]:
            return f"{key} is {before[key]} in A and {after[key]} in B"
    for name, each in (("A", before), ("B", after)):
        if not positive(each):
            return f"not all of it is above 0 in {name}"
    if before.get("rounds") and after.get("rounds") and len(before["rounds"]) + len(after["rounds"]) < 3:
        return "a single round does not show its noise"
    return None


def positive(figure: Figure) -> bool:
    values = (*(figure[key] for key in ("value", "low", "high")), *figure.get("rounds", ()))
    return all(0 < value < math.inf for value in values)


def lost(before: Figures, after: Figures) -> list[str]:
    """What A has and B has not, or not as that quantity."""
    return [
        name
        for name, each in before.items()
        if name not in after
        or (positive(each) and not positive(after[name]))
        or any(each[key] != after[name][key] for key in ("unit", "better"))
    ]


def comparable(before: Figures, after: Figures) -> list[str]:
    """The figures that both have and that can be compared."""
    return [name for name in before if name in after and why_not(before[name], after[name]) is None]


def compare(before: Figures, after: Figures) -> list[Change]:
    """Each comparable figure by itself."""
    names = comparable(before, after)
    pairs = [worse(before[name], after[name]) for name in names]
    known = [bool(upper.get("rounds") and lower.get("rounds")) for upper, lower in pairs]
    share = each_share(2 * len(pairs) or 1)  # half of all chances of an error are the parts'
    of_rounds = iter(ratios([(a["rounds"], b["rounds"]) for (a, b), has in zip(pairs, known) if has], share))
    found = [next(of_rounds) if has else of_intervals(*pair, share) for pair, has in zip(pairs, known)]
    return [Change(name, before[name], after[name], ratio) for name, ratio in zip(names, found, strict=True)]


def compare_parts(before: Figures, after: Figures) -> list[Change]:
    """Of all that goes by the same two first names: round by round the geometric mean of costs, to that of A."""
    members = defaultdict(list)
    for name in comparable(before, after):
        rounds = tuple(len(each[name].get("rounds", ())) for each in (before, after))
        members["/".join(name.split("/")[:2]), rounds].append(name)
    several = {key: names for key, names in members.items() if len(names) > 1 and min(key[1]) > 1}
    both = [[costs([each[name] for name in names]) for names in several.values()] for each in (before, after)]
    found = ratios([*zip(both[1], both[0])], each_share(2 * len(several) or 1))
    changes = []
    for ((name, _), names), old, new, ratio in zip(several.items(), *both, found, strict=True):
        one = statistics.median(old)
        was, now = (figure([each / one for each in rounds], "of its cost in A", "lower") for rounds in (old, new))
        changes.append(Change(f"{name}, {len(names)} together", was, now, ratio))
    return changes


def costs(members: Sequence[Figure]) -> list[float]:
    """Of each round, the geometric mean of what takes longer the worse it is."""
    signs = [1 if each["better"] == "lower" else -1 for each in members]
    rounds = zip(*(each["rounds"] for each in members), strict=True)
    return [math.exp(statistics.fmean(s * math.log(v) for s, v in zip(signs, each))) for each in rounds]


def worse(before: Figure, after: Figure) -> tuple[Figure, Figure]:
    """Those whose ratio is above 1 where it got worse."""
    return (after, before) if before["better"] == "lower" else (before, after)


def of_intervals(upper: Figure, lower: Figure, share: float = SURE) -> Ratio:
    """On the scale of logarithms, where a ratio is a difference; each has the interval that holds 95 %."""
    value = upper["value"] / lower["value"]
    wider = NormalDist().inv_cdf((1 + share) / 2) / NormalDist().inv_cdf((1 + SURE) / 2)
    spread = wider * math.hypot(*(half_width(each) for each in (upper, lower)))
    return Ratio(value, value * math.exp(-spread), value * math.exp(spread))


def half_width(figure: Figure) -> float:
    return math.log(figure["high"] / figure["low"]) / 2


def table(changes: Sequence[Change], least: float) -> Iterator[str]:
    """What changed, the worst first, and how much is as it was."""
    changed = [change for change in changes if change.verdict(least) != "the same"]
    for change in sorted(changed, key=lambda change: -change.ratio.value):
        by = f"{change.ratio.value:.3f} ({change.ratio.low:.3f} to {change.ratio.high:.3f}) times as slow"
        values = f"{change.before['value']:,.4g} → {change.after['value']:,.4g} {change.before['unit']}"
        yield f"{change.verdict(least)}: {change.name}: {values}, {by}"
    yield f"{len(changes) - len(changed)} of {len(changes)} are the same within the noise."


def visible(changes: Sequence[Change], least: float) -> float:
    """The loss that half of them would have shown."""
    return statistics.median((1 + least) * each.ratio.value / each.ratio.low - 1 for each in changes)


def beside(before: Figures, after: Figures) -> Iterator[str]:
    """What was not compared."""
    for name, each in before.items():
        if name not in after:
            yield f"missing in B: {name}"
        elif reason := why_not(each, after[name]):
            yield f"cannot be compared: {name}: {reason}"
    if more := len(after.keys() - before.keys()):
        yield f"Figures only in B: {more}."


def quick(reports: Reports) -> bool:
    """Whether any of a folder's figures say nothing."""
    return any(report.get("quick") or "--quick" in report.get("command", "").split() for report in reports.values())


def processors(reports: Reports) -> set[str]:
    return {report["machine"]["cpu"] for report in reports.values() if "cpu" in report.get("machine", {})}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.reports.compare",
    )
    parser.add_argument("before", type=Path, metavar="A", help="a folder of results")
    parser.add_argument("after", type=Path, metavar="B", help="another one, of the same machine")
    parser.add_argument("--least", type=float, default=0.05, help="slower by this share is no matter")
    chosen = parser.parse_args(argv)
    if chosen.least < 0:
        parser.error("--least should not be below 0")
    folders = [reports(folder) for folder in (chosen.before, chosen.after)]
    if quick(folders[0]) != quick(folders[1]):
        print("One of them is of a quick run, whose figures say nothing.", file=sys.stderr)
        return 2
    if differing := processors(folders[0]) ^ processors(folders[1]):
        print(f"Warning: only one of them is of {', '.join(sorted(differing))}.", file=sys.stderr)
    before, after = (figures(folder) for folder in folders)
    changes = compare(before, after)
    if not changes:
        print(f"{chosen.before} and {chosen.after} have no figure in common.", file=sys.stderr)
        return 2
    parts = compare_parts(before, after)
    for what, each in (("figures", changes), ("parts", parts)):
        if each:
            print(f"Half of the {what} would show a loss of {visible(each, chosen.least):.0%}.")
            print("\n".join(table(each, chosen.least)))
    for line in beside(before, after):
        print(line)
    slower = any(change.verdict(chosen.least) == "slower" for change in (*changes, *parts))
    return int(slower or bool(lost(before, after)))


if __name__ == "__main__":
    sys.exit(main())
