"""Every implementation computes what upstream computes, however the tokens are fed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.kernels.base import Kernels, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import TorchKernels
from tests.kernels.support import CONFORMANCE, CPU, alone, distance, in_a_crowd, states_for

TOLERANCE = 1e-4
STEPS = 200  # of those fed token by token, which the reference takes its time for
FOLDERS = sorted(folder.name for folder in CONFORMANCE.iterdir() if folder.is_dir())
Make = Callable[[Weights], Kernels]


def read(name: str) -> tuple[Weights, Tensor, Tensor]:
    expected = load_file(CONFORMANCE / name / "expected.safetensors")
    weights = load_model(CONFORMANCE / name, torch.float32, CPU).weights
    return weights, expected["input_ids"], expected["logits"]


@pytest.mark.parametrize("make", [TorchKernels, CpuKernels])
@pytest.mark.parametrize("name", FOLDERS)
class TestConformance:
    def test_whole(self, name: str, make: Make) -> None:
        weights, tokens, expected = read(name)
        states = states_for(weights, len(tokens))
        for slot, (row, logits) in enumerate(zip(tokens, expected)):
            assert distance(alone(make(weights), states, row, slot, []), logits) <= TOLERANCE

    def test_token_by_token(self, name: str, make: Make) -> None:
        weights, tokens, expected = read(name)
        row, logits = tokens[0, :STEPS], expected[0, :STEPS]
        kernels, states = make(weights), states_for(weights, 1)
        assert distance(alone(kernels, states, row, 0, range(1, len(row))), logits) <= TOLERANCE

    def test_in_ragged_pieces_among_others(self, name: str, make: Make) -> None:
        weights, tokens, expected = read(name)
        generator = np.random.default_rng(0)
        others = torch.randint(0, len(weights.embed), (3, 50), generator=torch.Generator().manual_seed(0))
        rows = [*tokens, *others]
        slots = generator.permutation(len(rows) + 2)[: len(rows)].tolist()
        logits = in_a_crowd(
            make(weights), states_for(weights, len(rows) + 2), dict(zip(slots, rows)), generator, longest=90
        )
        for slot, right in zip(slots, expected):
            assert distance(logits[slot], right) <= TOLERANCE
