"""The GPU check is run where there is a GPU; what of it needs none is tested here."""

from __future__ import annotations

import pytest
import torch

from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks import gpu_check
from benchmarks.synthetic import synthetic_weights
from tests.kernels.support import distance, model, states_for


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().out == "gpu-check: there is no GPU on this machine, nothing was measured\n"


def test_what_it_compares_with_computes_the_same() -> None:
    weights = synthetic_weights(model(2, 2, 16, 32, 20), 0.3)
    tokens = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    kernels, states = TorchKernels(weights), states_for(weights, 3)
    for t in range(7):
        batch = RaggedBatch(tokens[:, t], torch.full((3,), t), range(4), range(3))
        before = states.clone()
        logits = kernels.logits(kernels.forward(states, batch))
        assert distance(gpu_check.dense_step(weights, before, batch), logits) <= 1e-6
        assert torch.equal(before, states) or distance(before, states) <= 1e-6
    assert distance(gpu_check.recompute(weights, tokens), logits) <= 1e-5
