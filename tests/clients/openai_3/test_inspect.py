from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Endpoint
from inspect_ai import Task, eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@pytest.mark.parametrize("provider", ["openai-api/bdh", "vllm"])
def test_an_evaluation(endpoint: Endpoint, tmp_path: Path, provider: str) -> None:
    model = get_model(f"{provider}/{endpoint.model}", base_url=endpoint.url, api_key=endpoint.key)
    samples = [Sample(input="Or not to", target="be", choices=["be", "see"])]
    task = Task(dataset=samples, solver=generate(), scorer=includes())
    (log,) = evaluate(task, model=model, log_dir=str(tmp_path), max_tokens=20, display="none")
    assert log.status == "success", log.error
    assert log.stats.model_usage
