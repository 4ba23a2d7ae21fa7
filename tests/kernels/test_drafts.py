"""Drafts in the CPU kernels: the bits of tokens one by one, and states that have what was accepted and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cpu import CpuKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import VARIANTS, model, poison, states_for, variant

KNOWN, DRAFTS = [40, 5, 1, 64], [7, 0, 3, 5]  # tokens of each sequence before, and drafts behind one more
ACCEPTED = [7, 0, 2, 0]
WINDOW = 64


def step(
    kernels: CpuKernels, states: Tensor, tokens: Tensor, segments: list[tuple[int, int, int]], drafts: list[int]
) -> Tensor:
    """The hidden vectors of segments: slot, first and last position. All sequences have the same `tokens`."""
    poison(kernels)
    bounds = [0]
    for _, begin, end in segments:
        bounds.append(bounds[-1] + end - begin)
    batch = RaggedBatch(
        tokens=torch.cat([tokens[begin:end] for _, begin, end in segments]),
        positions=torch.cat([torch.arange(begin, end) for _, begin, end in segments]),
        bounds=bounds,
        slots=[slot for slot, _, _ in segments],
        drafts=drafts,
    )
    return kernels.forward(states, batch)


def one_by_one(weights: Weights, states: Tensor, tokens: Tensor, slot: int, begin: int, end: int) -> Tensor:
    kernels = CpuKernels(weights, states_window(states))
    return torch.cat([step(kernels, states, tokens, [(slot, at, at + 1)], []) for at in range(begin, end)])


def states_window(states: Tensor) -> int:
    return WINDOW if states.dim() == 6 else 0


@pytest.mark.parametrize("name", [VARIANTS[0], VARIANTS[-1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, WINDOW])
def test_drafts_have_the_bits_of_tokens_one_by_one(window: int, dtype: torch.dtype, name: str) -> None:
    """Accepted all, in part or not at all, among others without any, in states of both widths and over blocks."""
    weights = variant(synthetic_weights(model(2, 2, 33, 66, 60), 0.4), name)
    tokens = torch.randint(0, 60, (100,), generator=torch.Generator().manual_seed(1))
    kernels, states = CpuKernels(weights, window), states_for(weights, len(KNOWN), window, dtype)
    step(kernels, states, tokens, [(slot, 0, known) for slot, known in enumerate(KNOWN)], [])
    right, after = states.clone(), states.clone()
    segments = [(slot, known, known + 1 + drafts) for slot, (known, drafts) in enumerate(zip(KNOWN, DRAFTS))]
    hidden = step(kernels, states, tokens, segments, DRAFTS)
    expected = torch.cat([one_by_one(weights, right, tokens, *segment) for segment in segments])
    assert torch.equal(hidden, expected)
    for slot, known in enumerate(KNOWN):
        one_by_one(weights, after, tokens, slot, known, known + 1)
    assert torch.equal(states, after), "drafts do not enter the states"
    kernels.accept(states, ACCEPTED)
    for slot, (known, accepted) in enumerate(zip(KNOWN, ACCEPTED)):
        if accepted:
            one_by_one(weights, after, tokens, slot, known + 1, known + 1 + accepted)
    assert torch.equal(states, after), "those accepted do, in their order"


def test_drafts_that_are_too_many_for_a_step_are_refused() -> None:
    weights = synthetic_weights(model(1, 1, 16, 32, 9), 0.4)
    kernels, states = CpuKernels(weights), states_for(weights, 2)
    with pytest.raises(ValueError, match="drafts"):
        step(kernels, states, torch.zeros(300, dtype=torch.int64), [(0, 0, 250), (1, 0, 10)], [0, 9])
