from __future__ import annotations

import pytest
import torch

from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Outcome, Plan, SamplingParams, Segment
from bdh_batch.model import activity
from bdh_batch.model.activity import Activity
from bdh_batch.model.checkpoint import load_model
from bdh_batch.model.runner import Runner
from bdh_batch.model.state import StatePool
from bdh_batch.runtime import bundled_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [0, 8])
def test_a_look_tells_how_sparse_a_trained_model_is_and_changes_nothing(window: int) -> None:
    model = load_model(bundled_model(), torch.float32, CPU)
    drawn, looks = [], []
    for watching in (None, Activity(model.weights, window)):
        runner = Runner(TorchKernels(model.weights, window), StatePool(model.config, 1, CPU, window), watching)
        tokens, outcomes = list(b"ROMEO:\nBut soft"), list[Outcome]()
        start = 0
        while len(tokens) < 28:
            segment = Segment(0, start, bytes(tokens[start:]), SamplingParams(temperature=0.0))  # as prompts come
            start = len(tokens)
            outcomes.append(runner.run(Plan([segment])))
            tokens += [token for token in outcomes[-1].drawn if token is not None]
        drawn.append(tokens)
        looks.append([list(outcome.active) for outcome in outcomes if outcome.active])
    assert drawn[0] == drawn[1]
    assert looks[0] == []
    (shares,) = looks[1]  # at the eighth step
    assert len(shares) == model.config.n_layer
    assert all(0.0 < share < 0.45 for share in shares)  # an untrained model's are a half


def test_nobody_looks_at_a_sequence_that_begins() -> None:
    model = load_model(bundled_model(), torch.float32, CPU)
    watching = Activity(model.weights)
    states = torch.full((1,), torch.nan)
    assert all(watching.look(states, [Segment(0, 0, [1], None)]) == [] for _ in range(2 * activity.EVERY))
