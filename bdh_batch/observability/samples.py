"""Compares what processes have counted from one moment to the next: rates, quantiles, and how busy the server is.

A sample is the whole server's, whatever processes it has. Knows no clock.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

from bdh_batch.observability.figures import Figures, ModelFigures, TenantFigures

QUANTILES = (0.5, 0.95, 0.99)
MODELS = 32  # that a sample has figures of their own of: the busiest
LEVELS = ("running", "waiting", "swapped", "slots", "cached_prefixes", "in_flight")
LABELLED = ("rejections", "failovers", "ended")
Sample = dict[str, object]


class Comparing:
    """Makes samples of what each process has counted since the last one."""

    def __init__(self) -> None:
        self._before: Mapping[str, Figures] = {}
        self._time: float | None = None

    def sample(self, now: float, figures: Mapping[str, Figures]) -> Sample | None:
        """Returns what has happened up to `now`, in Unix seconds; None where there is nothing to compare with.

        Args:
            figures: what each process has counted, by its name.
        """
        since, self._time = self._time, now
        before, self._before = self._before, figures
        if since is None or now <= since:
            return None
        changes: dict[str, ModelFigures] = {}
        for name, each in figures.items():
            known = before.get(name)
            if known is not None and known.started == each.started:
                _add_change(changes, each, known)
            elif each.started >= since:  # it has begun since the last sample
                _add_change(changes, each, None)
            else:
                _add_change(changes, each, each)
        return _sample(now, now - since, changes)


def tenants_of(figures: Iterable[Figures]) -> dict[str, TenantFigures]:
    """Returns what tenants have of all processes together."""
    found: dict[str, TenantFigures] = {}
    for each in figures:
        for label, one in each.tenants.items():
            total = found.setdefault(label, TenantFigures())
            total.waiting += one.waiting
            total.requests += one.requests
            total.prompt_tokens += one.prompt_tokens
            total.completion_tokens += one.completion_tokens
    return found


def quantile(counts: Mapping[float, float], share: float) -> float | None:
    """Returns the value that `share` of all observations are not above, None where there are none.

    Args:
        counts: observations by the upper bound of their bucket, and of those below it. Inside a bucket they are taken
            to lie evenly, as Prometheus' `histogram_quantile` does; beyond the last finite bound, at that bound.
    """
    bounds = sorted(counts)
    total = counts[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    rank = share * total
    for lower, upper in pairwise([0.0, *bounds]):
        below = counts.get(lower, 0.0)
        if counts[upper] >= rank and counts[upper] > below:
            return lower if math.isinf(upper) else lower + (upper - lower) * (rank - below) / (counts[upper] - below)
    return None


def _add_change(changes: dict[str, ModelFigures], now: Figures, before: Figures | None) -> None:
    for name, figures in now.models.items():
        known = None if before is None else before.models.get(name)
        change = changes.setdefault(name, ModelFigures())
        _add(change.levels, figures.levels, {})
        _add(change.counts, figures.counts, {} if known is None else known.counts)
        for kind, buckets in figures.histograms.items():
            earlier = {} if known is None else known.histograms.get(kind, {})
            _add(change.histograms.setdefault(kind, {}), buckets, earlier)


def _add(into: dict[str, float], now: Mapping[str, float], before: Mapping[str, float]) -> None:
    for name, value in now.items():
        into[name] = into.get(name, 0.0) + max(0.0, value - before.get(name, 0.0))


def _sample(now: float, seconds: float, changes: Mapping[str, ModelFigures]) -> Sample:
    total = ModelFigures()
    for change in changes.values():
        _add(total.levels, change.levels, {})
        _add(total.counts, change.counts, {})
        for kind, buckets in change.histograms.items():
            _add(total.histograms.setdefault(kind, {}), buckets, {})
    counts, steps = total.counts, total.counts.get("steps", 0.0)
    queries = counts.get("cache_queries", 0.0)
    of_models = {name: _of_model(each, seconds) for name, each in changes.items() if name}
    busiest = sorted(of_models, key=lambda name: (-of_models[name]["running"], -of_models[name]["generated"], name))
    return {
        "time": round(now, 3),
        "generated": _rate(counts, "generated", seconds),
        "prompt": _rate(counts, "prompt", seconds),
        "steps": _rate(counts, "steps", seconds),
        "occupancy": round(counts.get("sequences", 0.0) / steps, 2) if steps else None,
        "step_seconds": round(counts.get("step_seconds", 0.0) / steps, 6) if steps else None,
        "prefix_hits": round(counts.get("cache_hits", 0.0) / queries, 4) if queries else None,
        "preemptions": int(counts.get("preemptions", 0.0)),
        **{name: int(total.levels.get(name, 0.0)) for name in LEVELS},
        **{
            kind: _quantiles(total.histograms.get(kind, {})) for kind in ("first_token", "between_tokens", "queue_time")
        },
        **{kind: _by_label(counts, kind) for kind in LABELLED},
        "responses": _by_class(counts),
        "models": {name: of_models[name] for name in busiest[:MODELS]},
    }


def _of_model(change: ModelFigures, seconds: float) -> dict[str, float]:
    levels = {name: int(change.levels.get(name, 0.0)) for name in ("running", "waiting", "slots")}
    return levels | {name: _rate(change.counts, name, seconds) for name in ("generated", "prompt")}


def _rate(counts: Mapping[str, float], name: str, seconds: float) -> float:
    return round(counts.get(name, 0.0) / seconds, 1)


def _quantiles(buckets: Mapping[str, float]) -> list[float] | None:
    by_bound = {float(bound): count for bound, count in buckets.items()}
    found = [quantile(by_bound, share) for share in QUANTILES]
    return [round(value, 6) for value in found if value is not None] or None


def _by_label(counts: Mapping[str, float], kind: str) -> dict[str, int]:
    """Without those of which there were none."""
    return {
        name.partition(".")[2]: int(count) for name, count in counts.items() if name.startswith(f"{kind}.") and count
    }


def _by_class(counts: Mapping[str, float]) -> dict[str, int]:
    """Responses by the first digit of their status, as in `2xx`."""
    found: defaultdict[str, int] = defaultdict(int)
    for status, count in _by_label(counts, "responses").items():
        found[f"{status[0]}xx"] += count
    return dict(found)
