"""A segment that begins in a copy has the bits of one whose state was copied before the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from bdh_batch.kernels.base import Kernels, RaggedBatch, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.cpu_layout import MAX_TOKENS
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import model, poison, states_for, text
from tests.kernels.test_cpu import models

WINDOW = 12


def full_states(weights: Weights, slots: int, window: int, dtype: torch.dtype) -> Tensor:
    states = states_for(weights, slots, window, dtype)
    return states.copy_(torch.randn(states.shape, generator=torch.Generator().manual_seed(1)))


def batch_of(lengths: list[int], seed: int, vocabulary: int) -> RaggedBatch:
    """Segments at random positions in random slots, that begin in others which no segment has, or in their own. Of the
    lone tokens, some only read."""
    draw = np.random.default_rng(seed)
    slots = draw.permutation(len(lengths) + 3).tolist()
    slots, kept = slots[: len(lengths)], slots[len(lengths) :]
    starts = draw.integers(1, 40, len(lengths))
    return RaggedBatch(
        tokens=text(sum(lengths), vocabulary, seed),
        positions=torch.cat([torch.arange(length) + int(start) for length, start in zip(lengths, starts)]),
        bounds=[0, *np.cumsum(lengths).tolist()],
        slots=slots,
        frozen=[length == 1 and bool(draw.integers(2)) for length in lengths],
        sources=[int(draw.choice([slot, *kept])) for slot in slots],
    )


def check(kernels: Kernels, states: Tensor, batch: RaggedBatch) -> None:
    copied = states.clone()
    for slot, source in zip(batch.slots, batch.sources):
        copied[slot] = states[source]
    poison(kernels)
    expected = kernels.forward(copied, replace(batch, sources=()))
    poison(kernels)
    assert torch.equal(kernels.forward(states, batch), expected)
    assert torch.equal(states, copied)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=models(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([0, WINDOW]),
    lengths=st.lists(st.just(1) | st.integers(1, 30), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
def test_the_same_bits_as_with_a_copy_before(
    weights: Weights, dtype: torch.dtype, window: int, lengths: list[int], seed: int
) -> None:
    """Any shape, dtype and window; forks of one state, segments in copies beside others, and some that only read."""
    batch = batch_of(lengths, seed, len(weights.embed))
    check(CpuKernels(weights, window), full_states(weights, len(lengths) + 3, window, dtype), batch)


@pytest.mark.parametrize("kernels", [CpuKernels, TorchKernels])
def test_what_is_longer_than_a_round_begins_once(kernels: type[Any]) -> None:
    """The second segment goes through three rounds; the last one begins where a round does."""
    weights = synthetic_weights(model(2, 2, 32, 64, 40), 0.3)
    lengths = [3, 2 * MAX_TOKENS - 1, MAX_TOKENS - 2, 1, 5]
    batch = replace(batch_of(lengths, 3, 40), slots=[4, 1, 3, 0, 2], sources=[6, 6, 3, 5, 6], frozen=())
    check(kernels(weights, WINDOW), full_states(weights, 7, WINDOW, torch.float32), batch)
