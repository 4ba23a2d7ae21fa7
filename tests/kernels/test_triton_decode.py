"""Decode steps of the Triton kernels that draw as they go, against the same step kernel by kernel: the same states,
logits and tokens, by graphs where there is a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")

from bdh_batch.kernels.base import DecodeBatch, Decoded, RaggedBatch
from bdh_batch.kernels.cuda import TritonKernels
from bdh_batch.kernels.drawing import NO_TOKEN
from benchmarks.engine import gpu_graphs
from benchmarks.engine.gpu_graphs import differing_draws, random_rows, tokens_of
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import model
from tests.kernels.test_triton import DEVICE, SMALL, on_device, states_on_device, text

pytestmark = pytest.mark.no_cover  # tracing would more than double what the interpreter takes

VOCABULARY = 40


@pytest.mark.parametrize(("window", "dtype"), [(0, torch.float32), (6, torch.bfloat16)])
def test_a_step_leaves_and_draws_what_it_does_kernel_by_kernel(window: int, dtype: torch.dtype) -> None:
    weights = on_device(synthetic_weights(model(2, 1, 16, 32, VOCABULARY), 0.3))
    kernels = TritonKernels(weights, window, SMALL, max_tokens=8, latent=True)
    mine = states_on_device(weights, 8, window).to(dtype)
    right, generator = mine.clone(), np.random.default_rng(5)
    for step, count in enumerate((3, 8, 1, 5)):
        slots = generator.permutation(8)[:count].tolist()
        rows, uniform = random_rows(generator, count, VOCABULARY)
        tokens = text(count, VOCABULARY, step).tolist()
        frozen = [number == 1 for number in range(count)]
        vectors = torch.randn(1, 16, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        if count > 1:
            tokens[1] = -1
        batch = DecodeBatch(tokens, [step] * count, slots, rows, uniform, frozen, vectors)
        decoded = kernels.decode(mine, batch)
        hidden, logits, drawn = decoded.hidden.clone(), decoded.logits.clone(), decoded.tokens()
        ragged = RaggedBatch(
            torch.tensor(tokens, device=DEVICE), torch.full((count,), step, device=DEVICE), range(count + 1), slots,
            [True] * count, vectors, frozen,
        )  # fmt: skip
        expected = kernels.forward(right, ragged)
        assert torch.equal(hidden, expected)
        assert torch.equal(mine, right)
        assert torch.equal(logits, kernels.logits(expected))
        assert drawn == tokens_of(logits, rows, uniform)
        assert NO_TOKEN not in drawn


def test_the_check_on_a_gpu_tells_other_tokens_and_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_graphs, "SIZES", (3, 1))
    weights = on_device(synthetic_weights(model(1, 1, 16, 32, VOCABULARY), 0.3))
    kernels, states = TritonKernels(weights, 0, SMALL, max_tokens=4), states_on_device(weights, 4)
    same = {"drawn": 4, "others": 0, "others_alone": 0, "states_are_the_same": True}
    assert differing_draws(kernels, states, VOCABULARY) == same
    decode = kernels.decode

    def other(states: Tensor, batch: DecodeBatch) -> Decoded:
        found = decode(states, batch)
        states += 1
        return replace(found, tokens=lambda: [token + 1 for token in found.tokens()])

    monkeypatch.setattr(kernels, "decode", other)
    wrong = {"drawn": 4, "others": 4, "others_alone": 4, "states_are_the_same": False}
    assert differing_draws(kernels, states, VOCABULARY) == wrong
