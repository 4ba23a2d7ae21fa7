"""How sparsely a model fires is measured now and then, from what the kernels compute in that step in any case."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine import runner as module
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import Kernels, RaggedBatch
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Outcome, Plan, SamplingParams, Segment
from bdh_batch.processes.model_settings import bundled_model
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import model as config_of, states_for

CPU = torch.device("cpu")
TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"


def shares(kernels: Kernels, states: Tensor, batch: RaggedBatch) -> Tensor:
    active = torch.full((states.shape[1],), torch.nan)
    kernels.forward(states, batch, active)
    return active


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [1, 40, 3], [300]])
def test_the_kernels_count_what_fires_as_the_specification_does(lengths: list[int], window: int) -> None:
    config: BDHConfig = config_of(3, 2, 48, 96, 60)
    weights = synthetic_weights(config, 0.3)
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    tokens = torch.randint(0, 60, (bounds[-1],), generator=torch.Generator().manual_seed(1))
    batch = RaggedBatch(tokens, positions, bounds, range(len(lengths)))
    found, expected = (
        shares(kernels, states_for(weights, len(lengths), window), batch)
        for kernels in (CpuKernels(weights, window), TorchKernels(weights, window))
    )
    assert ((expected > 0) & (expected < 1)).all()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # a neuron at 0 may fall to either side


@pytest.mark.parametrize("kind", [CpuKernels, TorchKernels])
def test_a_look_tells_how_sparse_a_trained_model_is_and_changes_nothing(
    kind: type[CpuKernels | TorchKernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(bundled_model(), torch.float32, CPU)
    drawn, looks = [], []
    for every in (10**9, 10):
        monkeypatch.setattr(module, "LOOK_EVERY", every)
        runner = Runner(kind(model.weights), StatePool(model.config, 1, CPU))
        tokens, outcomes, start = list(b"ROMEO:\nBut soft"), list[Outcome](), 0
        while len(tokens) < 36:
            segment = Segment(0, start, bytes(tokens[start:]), SamplingParams(temperature=0.0))  # as prompts come
            start = len(tokens)
            outcomes.append(runner.run(Plan([segment])))
            tokens += [token for token in outcomes[-1].drawn if token is not None]
        drawn.append(tokens)
        looks.append([list(outcome.active) for outcome in outcomes if outcome.active])
    assert drawn[0] == drawn[1]
    assert [len(shares) for shares in looks] == [1, 2]  # at the eighth step, and at the eighteenth
    for shares in looks[1]:
        assert len(shares) == model.config.n_layer
        assert all(0.0 < share < 0.45 for share in shares)  # an untrained model's are a half


def test_a_step_that_is_looked_at_computes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one pass over the states of the batch, as every other step, and touches no other slot."""
    model = load_model(TINY, torch.float32, CPU)
    passes: list[bool] = []
    forward = CpuKernels.forward

    def counted(
        self: CpuKernels, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        passes.append(active is not None)
        return forward(self, states, batch, active, fired)

    monkeypatch.setattr(CpuKernels, "forward", counted)
    runner = Runner(CpuKernels(model.weights), StatePool(model.config, 1, CPU))
    for position in range(module.LOOK_EVERY):
        runner.run(Plan([Segment(0, position, [65], SamplingParams(temperature=0.0))]))
    assert passes == [step == module.FIRST_LOOK for step in range(1, module.LOOK_EVERY + 1)]
