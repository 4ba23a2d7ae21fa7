"""How many times as large one run's rounds are as another's, and how sure that is with few rounds of many figures.

Rounds of two runs are no pairs, and three of them say little of their own noise. On the scale of logarithms, each
figure's variance is drawn towards that of all figures, the more the more alike they are (a moderated t, as limma's:
Smyth 2004, doi:10.2202/1544-6115.1027). Where noise is all the difference, it is within all intervals together in 95 %
of comparisons (Bonferroni). What drifts from one run to the next, and not from round to round, is in none of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.special import digamma, polygamma

from benchmarks.common import Ratio

SURE = 0.95
FREEDOMS = torch.logspace(-1, 3, 1000, dtype=torch.float64)
Rounds = Sequence[float]


@dataclass(frozen=True)
class Spread:
    """Of a figure's rounds: the variance of their logarithms, and the degrees of freedom behind it."""

    variance: float
    freedom: float


def each_share(comparisons: int) -> float:
    """What one interval has to hold so that all of them hold together."""
    return 1 - (1 - SURE) / comparisons


def ratios(pairs: Sequence[tuple[Rounds, Rounds]], share: float) -> list[Ratio]:
    """Of each pair's geometric means, the first to the second, with the interval that holds a share.

    Args:
        pairs: rounds of two runs, all above 0, three or more together.
    """
    logs = [(log(upper), log(lower)) for upper, lower in pairs]
    spreads = steadied([within(*pair) for pair in logs])
    return [between(*pair, spread, share) for pair, spread in zip(logs, spreads, strict=True)]


def log(rounds: Rounds) -> Rounds:
    return [math.log(each) for each in rounds]


def within(*runs: Rounds) -> Spread:
    """What rounds differ by from their own run's mean."""
    freedom = sum(len(run) - 1 for run in runs)
    squares = sum((each - statistics.fmean(run)) ** 2 for run in runs for each in run)
    return Spread(squares / freedom, freedom)


def steadied(spreads: Sequence[Spread]) -> list[Spread]:
    """What all figures say of each one's noise. They say the more the less their variances differ beyond what so few
    rounds would make them differ."""
    if len(spreads) < 2:
        return list(spreads)
    variance, freedom = (
        torch.tensor(column, dtype=torch.float64)
        for column in ([each.variance for each in spreads], [each.freedom for each in spreads])
    )
    variance = variance.clamp(min=max(1e-5 * float(variance.median()), 1e-12))  # rounds may all be equal
    logs = variance.log() - bias(freedom)
    excess = logs.var() - polygamma(1, freedom / 2).mean()
    prior = FREEDOMS[(polygamma(1, FREEDOMS / 2) - excess).abs().argmin()]
    common = (logs.mean() + bias(prior)).exp()
    mixed = (prior * common + freedom * variance) / (prior + freedom)
    total = (freedom + prior).clamp(max=float(freedom.sum()))
    return [Spread(*pair) for pair in zip(mixed.tolist(), total.tolist(), strict=True)]


def bias(freedom: Tensor) -> Tensor:
    """By how much the logarithm of a variance is off in the mean."""
    off: Tensor = digamma(freedom / 2) - (freedom / 2).log()
    return off


def between(upper: Rounds, lower: Rounds, spread: Spread, share: float) -> Ratio:
    middle = statistics.fmean(upper) - statistics.fmean(lower)
    half = student(share, spread.freedom) * math.sqrt(spread.variance * (1 / len(upper) + 1 / len(lower)))
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


@cache
def student(share: float, freedom: float) -> float:
    """The t below whose size a share of Student's distribution lies; `freedom` is 1 or more."""
    angles = np.linspace(0, math.pi / 2, 20_001)  # of t / √freedom, where the density is a power of the cosine
    density = np.cos(angles) ** (freedom - 1)
    held = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(share, held / held[-1], angles)))
