"""Measuring fairly: variants take turns, and figures are medians with the interval of their rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Variants = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]
INTERVAL = {"value", "low", "high"}  # the keys of what `interval` gives, and `ratio` as a dictionary
FIGURE = INTERVAL | {"unit", "better"}
REST = 0.03  # seconds: torch's threads and Numba's are two pools, and idle ones spin for a while


def wall_clock(variant: Callable[[], object]) -> float:
    time.sleep(REST)
    start = time.perf_counter()
    variant()
    return time.perf_counter() - start


def take_turns(
    variants: Variants,
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
    tick: Callable[[], object] = lambda: None,
) -> Times:
    """The seconds of every run of each variant; they alternate, so that what else the machine does meets all of them.

    Args:
        clock: runs a variant and says how long it took.
        tick: is called after each round, for a progress bar.
    """
    for variant in variants.values():
        variant()
        variant()
    times: Times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            times[name].append(clock(variant))
        tick()
    return times


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(measured) for name, measured in times.items()}


def alternate(
    variants: Variants, repeats: int, clock: Callable[[Callable[[], object]], float] = wall_clock
) -> dict[str, float]:
    """The median seconds of each variant; they take turns."""
    return medians(take_turns(variants, repeats, clock))


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the interval that holds 95 % of those of resampled rounds.

    It never leaves the range of the rounds, and where they are few, it holds the true ratio less often than that.
    """

    value: float
    low: float
    high: float


def ratio(upper: Sequence[float], lower: Sequence[float], draws: int = 2000) -> Ratio:
    """Of two variants that took turns. Rounds are drawn again as pairs: what slows a round slows both its variants."""
    pairs = list(zip(upper, lower, strict=True))
    chance = random.Random(0)

    def of(drawn: Sequence[tuple[float, float]]) -> float:
        return statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn)

    found = sorted(of(chance.choices(pairs, k=len(pairs))) for _ in range(draws))
    return Ratio(of(pairs), found[int(0.025 * draws)], found[int(0.975 * draws) - 1])


def figure(rounds: Sequence[float], unit: str, better: str, draws: int = 2000) -> dict[str, Any]:
    """A measured quantity as reports hold it: the median of its rounds, and the interval that holds 95 % of those of
    resampled rounds. `compare.py` knows it by its keys.

    Medians of n resampled rounds never leave the rounds' range, which holds the true one with a chance of 1 - 2^(1-n):
    75 % with 3 rounds. Nor is in it what drifts from one run to the next.

    Args:
        better: "higher" or "lower".
    """
    return {**interval(rounds, draws), "unit": unit, "better": better, "rounds": list(rounds)}


def interval(rounds: Sequence[float], draws: int = 2000) -> dict[str, float]:
    """The median, and between what 95 % of those of resampled rounds lie."""
    chance = random.Random(0)
    found = sorted(statistics.median(chance.choices(rounds, k=len(rounds))) for _ in range(draws))
    low, high = found[int(0.025 * draws)], found[int(0.975 * draws) - 1]
    return {"value": statistics.median(rounds), "low": low, "high": high}
