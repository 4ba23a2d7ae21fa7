"""The model computes what upstream computes, however its tokens are split into steps and whoever shares them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Segment

CPU = torch.device("cpu")
FOLDERS = sorted((Path(__file__).parent.parent / "data" / "conformance").iterdir())[1:]
FLOAT32_TOLERANCE = 1e-4
SLOTS = 6

Pieces = list[tuple[int, int, int]]  # sequence, begin, end


def runner_for(folder: Path, dtype: torch.dtype = torch.float32) -> Runner:
    model = load_model(folder, dtype, CPU)
    pool = StatePool(model.config, SLOTS, CPU)
    pool.states.fill_(torch.nan)  # a sequence must not see what a slot held before
    return Runner(TorchKernels(model.weights), pool)


def whole(sequences: int, length: int) -> list[Pieces]:
    return [[(s, 0, length) for s in range(sequences)]]


def token_by_token(sequences: int, length: int) -> list[Pieces]:
    return [[(s, t, t + 1) for s in range(sequences)] for t in range(length)]


def random_pieces(sequences: int, length: int) -> list[Pieces]:
    """Sequences that start at different steps, rest in some, and advance by 1 to 40 tokens in random order."""
    rng = random.Random(7)
    reached, steps = [0] * sequences, []
    while min(reached) < length:
        step: Pieces = []
        for s in rng.sample(range(sequences), sequences):
            if reached[s] < length and rng.random() < 0.7:
                end = min(length, reached[s] + rng.choice([1, 1, 2, 3, 17, 40]))
                step.append((s, reached[s], end))
                reached[s] = end
        if step:
            steps.append(step)
    return steps


def run(runner: Runner, rows: Tensor, steps: list[Pieces]) -> Tensor:
    """Logits [rows, T, V] of token ids [rows, T]; row s runs in a slot that is not s."""
    found: dict[tuple[int, int], Tensor] = {}
    for step in steps:
        segments = [Segment(SLOTS - 1 - s, begin, rows[s, begin:end].tolist(), None) for s, begin, end in step]
        logits = iter(runner.logits(segments))
        for s, begin, end in step:
            found |= {(s, t): next(logits) for t in range(begin, end)}
    return torch.stack([torch.stack([found[s, t] for t in range(rows.shape[1])]) for s in range(len(rows))])


@pytest.mark.parametrize("split", [whole, token_by_token, random_pieces])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_are_upstreams_however_the_tokens_are_split(
    folder: Path, split: Callable[[int, int], list[Pieces]]
) -> None:
    expected = load_file(folder / "expected.safetensors")
    rows, logits = expected["input_ids"], expected["logits"]
    others = torch.flip(rows, dims=(0, 1))[:, : rows.shape[1]]  # strangers in the batch
    mixed = torch.cat((rows, others))
    found = run(runner_for(folder), mixed, split(len(mixed), rows.shape[1]))[: len(rows)]
    assert (found - logits).norm() / logits.norm() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_16_bit_weights_stay_near_upstreams_logits(dtype: torch.dtype, tolerance: float) -> None:
    folder = FOLDERS[0]
    expected = load_file(folder / "expected.safetensors")
    rows = expected["input_ids"]
    found = run(runner_for(folder, dtype), rows, whole(len(rows), rows.shape[1]))
    difference = (found - expected["logits"]).norm() / expected["logits"].norm()
    assert 1e-6 < difference <= tolerance  # 16 bits were used, and are enough
