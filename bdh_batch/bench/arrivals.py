"""When requests come: a Poisson process or one with more or less in bursts, at a rate that may rise.

Pure: the same seed gives the same times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from bdh_batch.errors import ConfigError


@dataclass(frozen=True)
class Ramp:
    """From one rate to another, by equal steps or by equal factors from arrival to arrival."""

    strategy: str  # linear or exponential
    start: float
    end: float

    def rate(self, share: float) -> float:
        """Arrivals a second after `share` of all arrivals."""
        if self.strategy == "linear":
            return self.start + (self.end - self.start) * share
        return float(self.start * (self.end / self.start) ** share)


def offsets(count: int, rate: float | Ramp, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start to each of `count` arrivals, in order.

    Intervals are drawn from a gamma distribution of shape `burstiness`, 1 being a Poisson process's; infinity draws
    nothing. At a fixed rate they are stretched such that the last arrival is at `count / rate`: the load that was asked
    for, whatever was drawn.

    Raises ConfigError where floats cannot hold such times.
    """
    if rate == math.inf:
        return [0.0] * count
    rates = [rate.rate(n / max(1, count - 1)) if isinstance(rate, Ramp) else rate for n in range(count)]
    if not (min(rates) > 0 and count / min(rates) < math.inf):
        raise ConfigError(f"{_named(rate)} {rates[0]:g}: the last request would never come")
    try:
        times = list(accumulate(_intervals(rates, burstiness, seed)))
    except (ArithmeticError, ValueError):  # of the gamma distribution, where its numbers leave those of floats
        times = [math.nan]
    last = times[-1] if isinstance(rate, Ramp) else count / rate
    if not (0 < times[-1] < math.inf and last / times[-1] < math.inf):
        raise ConfigError(
            f"--burstiness {burstiness:g}: no intervals can be drawn with it; --request-rate inf is one burst"
        )
    return [time * (last / times[-1]) for time in times]


def _named(rate: float | Ramp) -> str:
    return "--ramp-up-start-rps" if isinstance(rate, Ramp) else "--request-rate"


def _intervals(rates: Sequence[float], burstiness: float, seed: int) -> list[float]:
    if burstiness == math.inf:
        return [1 / rate for rate in rates]
    draw = Random(f"{seed}/arrivals")
    return [draw.gammavariate(burstiness, 1 / (rate * burstiness)) for rate in rates]
