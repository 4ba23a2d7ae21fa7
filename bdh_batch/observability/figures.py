"""What a process has counted so far and how busy it is, in a small form that processes send each other and compare.

It is read from the registry that Prometheus scrapes, so the two say the same. Knows nothing of time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client import Metric

TENANTS = 256  # of which one process tells others: those that used something last, and those of whom most wait
COUNTS = {
    "bdh_generation_tokens_total": "generated",
    "bdh_prompt_tokens_total": "prompt",
    "bdh_num_preemptions_total": "preemptions",
    "bdh_prefix_cache_queries_total": "cache_queries",
    "bdh_prefix_cache_hits_total": "cache_hits",
    "bdh_step_duration_seconds_count": "steps",
    "bdh_step_duration_seconds_sum": "step_seconds",
    "bdh_batch_occupancy_sum": "sequences",
    "bdh_upstream_failovers_total": "failovers.upstream",
}
LEVELS = {
    "bdh_num_requests_running": "running",
    "bdh_num_requests_waiting": "waiting",
    "bdh_num_requests_swapped": "swapped",
    "bdh_state_slots": "slots",
    "bdh_prefix_cache_states": "cached_prefixes",
    "bdh_http_requests_in_flight": "in_flight",
}
LABELLED = {  # counts of which there is one for each value of a label
    "bdh_admission_rejections_total": ("rejections", "reason"),
    "bdh_failovers_total": ("failovers", "reason"),
    "bdh_request_success_total": ("ended", "finished_reason"),
    "bdh_http_requests_total": ("responses", "status"),
}
UPSTREAM_TOKENS = "bdh_upstream_tokens_total"
HISTOGRAMS = {
    "bdh_time_to_first_token_seconds_bucket": "first_token",
    "bdh_upstream_time_to_first_token_seconds_bucket": "first_token",
    "bdh_inter_token_latency_seconds_bucket": "between_tokens",
    "bdh_request_queue_time_seconds_bucket": "queue_time",
}


@dataclass(slots=True)
class ModelFigures:
    """What was counted of one model, since the process began, and how busy it is.

    Args:
        histograms: observations by the upper bound of their bucket, and of those below it.
    """

    counts: dict[str, float] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(slots=True)
class TenantFigures:
    """What a tenant has of the server: sequences that wait now; and of its requests that have ended how many there
    were, and their tokens."""

    waiting: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Figures:
    """What one process has counted.

    Args:
        started: when it began to count, in Unix seconds: another process of its name has another one.
        models: by their names; what is of no model is that of the name "".
        tenants: some of them (`TENANTS`), by their labels.
    """

    started: float
    models: dict[str, ModelFigures]
    tenants: dict[str, TenantFigures] = field(default_factory=dict)

    def dump(self) -> bytes:
        """Returns it as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def load(cls, line: bytes) -> Figures:
        """Parses what `dump` returned. Raises ValueError, KeyError or TypeError: it is something else."""
        found: dict[str, Any] = json.loads(line)
        models = {name: ModelFigures(**each) for name, each in found["models"].items()}
        return cls(found["started"], models, {name: TenantFigures(**each) for name, each in found["tenants"].items()})


def read_figures(families: Iterable[Metric]) -> dict[str, ModelFigures]:
    """Returns the figures of each model among what a registry has collected."""
    found: dict[str, ModelFigures] = {}
    for family in families:
        for sample in family.samples:
            name, labels, value = sample.name, sample.labels, sample.value
            if name in COUNTS:
                _add(_of(found, labels).counts, COUNTS[name], value)
            elif name in LEVELS:
                _add(_of(found, labels).levels, LEVELS[name], value)
            elif name in HISTOGRAMS:
                _add(_of(found, labels).histograms.setdefault(HISTOGRAMS[name], {}), labels["le"], value)
            elif name in LABELLED:
                kind, label = LABELLED[name]
                _add(_of(found, labels).counts, f"{kind}.{labels[label]}", value)
            elif name == UPSTREAM_TOKENS:
                kind = "generated" if labels["kind"] == "completion" else "prompt"
                _add(_of(found, labels).counts, kind, value)
    return found


def _of(found: dict[str, ModelFigures], labels: Mapping[str, str]) -> ModelFigures:
    return found.setdefault(labels.get("model_name", labels.get("upstream", "")), ModelFigures())


def _add(values: dict[str, float], name: str, more: float) -> None:
    values[name] = values.get(name, 0.0) + more
