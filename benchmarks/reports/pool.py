"""One report of several repetitions: a measurement that was repeated at other times, each time as a report of its own.

A machine is faster in some minutes than in others. Rounds of one repetition share that, and show little of it: here a
whole repetition is a round, so that what drifts from one to the next is in the intervals.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common import FIGURE, INTERVAL, figure, interval


def pooled(parts: Sequence[Any]) -> Any:
    """Of reports, or of the same part of each.

    A figure has a round for each repetition, which is its median there; so has the interval of a ratio. Other numbers
    are medians over the repetitions, so that what was derived from others need not fit them to the digit. What only
    some have is pooled from those; texts that differ are those of the last.

    Raises:
        ValueError: they are not of one measurement: lists of other lengths, other kinds of things, other verdicts.
    """
    last = parts[-1]
    if len(parts) == 1:
        return last
    if all(isinstance(part, dict) for part in parts):
        return pooled_dicts(parts)
    if all(isinstance(part, list) for part in parts):
        return [pooled(column) for column in zip(*parts, strict=True)]
    if all(part == last for part in parts) or all(isinstance(part, str) for part in parts):
        return last
    if not all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts):
        raise ValueError(f"repetitions differ in what is no number: {parts}")
    return statistics.median(parts)


def pooled_dicts(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    last = parts[-1]
    if last.keys() >= FIGURE:
        return figure([part["value"] for part in parts], last["unit"], last["better"])
    if last.keys() == INTERVAL:
        return interval([part["value"] for part in parts])
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: pooled([part[name] for part in parts if name in part]) for name in names}
