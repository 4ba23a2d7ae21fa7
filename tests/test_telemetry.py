"""What the metrics count, where no server is needed to see it."""

from __future__ import annotations

from functools import partial

import pytest
from prometheus_client import CollectorRegistry

from bdh_batch.errors import GenerationFailed, NotFinite
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.observability.metrics import Metrics
from bdh_batch.text.sandbox import SandboxLoad
from tests.scheduler.fakes import make_sequence


@pytest.mark.parametrize(("error", "count"), [(NotFinite(), 1.0), (GenerationFailed("another fault"), 0.0)])
def test_logits_that_are_not_finite_are_counted(error: GenerationFailed, count: float) -> None:
    metrics = EngineMetrics(CollectorRegistry(), "bdh")
    ended = make_sequence([1], 1)
    ended.fail(error)
    metrics.finished(ended, now=1.0)
    labels = {"model_name": "bdh"}
    assert metrics.registry.get_sample_value("bdh_non_finite_logits_total", labels) == count
    errors = metrics.registry.get_sample_value("bdh_request_success_total", labels | {"finished_reason": "error"})
    assert errors == 1.0


def test_sandboxes_are_distinguished_by_what_they_do() -> None:
    metrics = Metrics("bdh")
    loads = {"templates": SandboxLoad(3, 1, {"ok": 7, "crash": 0}), "grammars": SandboxLoad(0, 2, {"timeout": 5})}
    metrics.watch_sandboxes("bdh", {work: partial(loads.__getitem__, work) for work in loads})
    labels = {"model_name": "bdh", "work": "templates"}
    assert metrics.registry.get_sample_value("bdh_sandbox_jobs_waiting", labels) == 3
    assert metrics.registry.get_sample_value("bdh_sandbox_jobs_running", labels | {"work": "grammars"}) == 2
    assert metrics.registry.get_sample_value("bdh_sandbox_jobs_total", labels | {"outcome": "ok"}) == 7
    assert metrics.exposition().count(b"# TYPE bdh_sandbox_jobs_waiting") == 1
    metrics.watch_sandboxes("bdh", {})
    assert metrics.registry.get_sample_value("bdh_sandbox_jobs_waiting", labels) is None
