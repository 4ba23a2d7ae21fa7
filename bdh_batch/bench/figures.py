"""Means and percentiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """Of sorted values, at least one, with straight lines between them, as numpy's default is."""
    position = (len(values) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


@dataclass(frozen=True)
class Figures:
    """Of one quantity, in its own unit."""

    mean: float
    median: float
    std: float  # of these values, not of what they are a sample of
    percentiles: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, values: Iterable[float], percents: Sequence[float]) -> Figures | None:
        """None where there are no values: there is nothing to say of them."""
        ordered = sorted(values)
        if not ordered:
            return None
        mean = math.fsum(ordered) / len(ordered)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
        reported = tuple((percent, percentile(ordered, percent)) for percent in percents)
        return cls(mean, percentile(ordered, 50), std, reported)
