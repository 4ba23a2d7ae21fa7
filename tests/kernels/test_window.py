"""A window attends to a token's block and the one before it, and to nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.kernels.base import Kernels, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels, layer_norm, project, rotate, rotation
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import (
    ALL_AT_ONCE,
    UPSTREAM,
    alone,
    distance,
    feed,
    in_a_crowd,
    model,
    states_for,
    variant,
)

Make = Callable[[Weights, int], Kernels]
WINDOW = 12
LENGTH = WINDOW // 2 * 55 + 4  # 55 boundaries


@pytest.fixture(scope="module", params=[UPSTREAM, ALL_AT_ONCE])
def weights(request: pytest.FixtureRequest) -> Weights:
    return variant(synthetic_weights(model(3, 2, 34, 68, 50), 0.3), request.param)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 50, (LENGTH,), generator=torch.Generator().manual_seed(1))


def by_mask(weights: Weights, tokens: Tensor, window: int) -> Tensor:
    """Upstream's attention over the whole context, with all pairs of tokens masked that the window does not join."""
    positions = torch.arange(len(tokens))
    blocks = positions // (window // 2)
    seen = (positions[:, None] > positions) & (blocks[:, None] - blocks <= 1)
    cos, sin = rotation(weights.frequencies, positions)
    x = layer_norm(F.embedding(tokens, weights.embed))
    for layer in range(weights.layers):
        encoder, encoder_v, decoder = (
            each[layer if len(each) > 1 else 0] for each in (weights.encoder, weights.encoder_v, weights.decoder)
        )
        fired = project(x, encoder).relu()
        q = rotate(fired, cos, sin)
        y = (q @ q.mT * seen) @ x
        gate = project(layer_norm(y), encoder_v).relu()
        x = x + layer_norm(project((fired * gate).transpose(0, 1).flatten(1), decoder))
        x = x if weights.final_norm else layer_norm(x)
    return project(layer_norm(x), weights.lm_head)


@pytest.mark.parametrize("make", [TorchKernels, CpuKernels])
@pytest.mark.parametrize("cuts", [[], range(1, LENGTH), [5, 6, 7, 50, 200]], ids=["whole", "by token", "in chunks"])
def test_is_a_mask(make: Make, cuts: list[int], weights: Weights, tokens: Tensor) -> None:
    logits = alone(make(weights, WINDOW), states_for(weights, 1, WINDOW), tokens, 0, cuts)
    assert distance(logits, by_mask(weights, tokens, WINDOW)) <= 1e-5


def test_cpu_agrees_with_the_specification_on_states_too(weights: Weights, tokens: Tensor) -> None:
    mine, right = states_for(weights, 1, WINDOW), states_for(weights, 1, WINDOW)
    got = alone(CpuKernels(weights, WINDOW), mine, tokens, 0, [100, 101])
    expected = alone(TorchKernels(weights, WINDOW), right, tokens, 0, [100, 101])
    assert distance(got, expected) <= 1e-5
    assert distance(mine, right) <= 1e-5


def test_the_same_bits_in_a_crowd(weights: Weights, tokens: Tensor) -> None:
    kernels = CpuKernels(weights, WINDOW)
    sequences = {4: tokens[:100], 0: tokens[50:170], 2: tokens[:30], 1: tokens[200:]}
    crowd = states_for(weights, 5, WINDOW)
    logits = in_a_crowd(kernels, crowd, sequences, np.random.default_rng(0), longest=40)
    for slot, row in sequences.items():
        single = states_for(weights, 1, WINDOW)
        assert torch.equal(alone(kernels, single, row, 0, []), logits[slot])
        assert torch.equal(single[0], crowd[slot])


@pytest.mark.parametrize("make", [TorchKernels, CpuKernels])
def test_a_copied_slot_is_a_fork(make: Make, weights: Weights, tokens: Tensor) -> None:
    kernels, states = make(weights, WINDOW), states_for(weights, 2, WINDOW)
    feed(kernels, states, {0: tokens}, [(0, 0, 75)])
    states[1] = states[0]
    first, second = feed(kernels, states, {0: tokens, 1: tokens}, [(0, 75, 130), (1, 75, 130)])
    assert distance(first, second) <= 1e-6


def test_rounding_does_not_build_up(weights: Weights) -> None:
    """The state after 2,000 blocks is as close to the plain sum over the last two as after a few."""
    tokens = torch.randint(0, 50, (WINDOW // 2 * 2000,), generator=torch.Generator().manual_seed(2))
    states = states_for(weights, 1, WINDOW)
    logits = alone(CpuKernels(weights, WINDOW), states, tokens, 0, [])
    late = by_mask(weights, tokens[-300:], WINDOW)  # RoPE is relative, and 3 layers of 2 blocks reach back 36 tokens
    assert distance(logits[-200:], late[-200:]) <= 1e-4
