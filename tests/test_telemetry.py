"""What the metrics count, where no server is needed to see it."""

from __future__ import annotations

import pytest

from bdh_batch.errors import GenerationFailed, NotFinite
from bdh_batch.telemetry import Metrics
from tests.scheduler.fakes import make_sequence


@pytest.mark.parametrize(("error", "count"), [(NotFinite(), 1.0), (GenerationFailed("another fault"), 0.0)])
def test_logits_that_are_not_finite_are_counted(error: GenerationFailed, count: float) -> None:
    metrics = Metrics("bdh")
    ended = make_sequence([1], 1)
    ended.fail(error)
    metrics.finished(ended, now=1.0)
    labels = {"model_name": "bdh"}
    assert metrics.registry.get_sample_value("bdh_non_finite_logits_total", labels) == count
    errors = metrics.registry.get_sample_value("bdh_request_success_total", labels | {"finished_reason": "error"})
    assert errors == 1.0
