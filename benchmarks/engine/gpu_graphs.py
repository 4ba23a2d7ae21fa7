"""Decode steps that draw as they go: sampling parameters for them, and whether a GPU's graphs draw what they should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bdh_batch.kernels.base import DecodeBatch, RaggedBatch
from bdh_batch.kernels.drawing import ROW, WORDS, Doubles, Draws, Rows, draw

if TYPE_CHECKING:
    from bdh_batch.kernels.cuda import TritonKernels

SIZES = (1, 2, 3, 31, 32, 100, 256, 256, 256, 256)  # sequences of the steps that are compared: more than 1,000 draws
POSITION = 900


def random_rows(generator: np.random.Generator, count: int, vocabulary: int) -> tuple[Rows, Doubles]:
    """Sampling parameters of every kind, in every company; and random numbers."""
    rows = np.zeros(count, ROW)
    rows["temperature"] = generator.choice([0, 1e-30, 0.3, 0.8, 1, 2, 100], count)
    rows["top_p"] = generator.choice([1e-9, 0.1, 0.5, 0.9, 1, 1], count)
    kept = generator.choice([0, 1, 2, 10, vocabulary], count)
    rows["kept"] = np.where((rows["top_p"] < 1) & (kept == 0), vocabulary, kept)
    with np.errstate(divide="ignore"):
        rows["least"] = np.log(generator.choice([0, 0, 1e-9, 0.03, 1], count))
    return rows, generator.random(count)


def tokens_of(logits: Tensor, rows: Rows, uniform: Doubles) -> list[int]:
    """What is drawn from finite `logits` [R, V], operator by operator."""
    words = torch.zeros(WORDS, len(rows), dtype=torch.int64)
    Draws.of(words).write(rows, uniform)
    found: list[int] = draw(logits, Draws.of(words.to(logits.device)), filters=True).tolist()
    return found


def differing_draws(kernels: TritonKernels, states: Tensor, vocabulary: int) -> dict[str, Any]:
    """How many tokens decode steps draw by random parameters; how many of them are not those of the same step when its
    kernels are launched one by one, or its rows are drawn alone; whether its states are the same. Takes a copy of
    `states`."""
    kernels.warm(states)
    generator, right, drawn, others, apart = np.random.default_rng(7), states.clone(), 0, 0, 0
    for count in (min(size, len(states)) for size in SIZES):
        rows, uniform = random_rows(generator, count, vocabulary)
        tokens, slots = generator.integers(0, vocabulary, count), generator.permutation(len(states))[:count].tolist()
        batch = DecodeBatch(tokens.tolist(), [POSITION] * count, slots, rows, uniform)
        mine = kernels.decode(states, batch).tokens()
        at = torch.full((count,), POSITION, device=states.device)
        ragged = RaggedBatch(torch.from_numpy(tokens).to(states.device), at, range(count + 1), slots)
        logits = kernels.logits(kernels.forward(right, ragged))
        each = [slice(row, row + 1) for row in range(count)]
        alone = [token for row in each for token in tokens_of(logits[row], rows[row], uniform[row])]
        drawn += count
        others += differing(mine, tokens_of(logits, rows, uniform))
        apart += differing(mine, alone)
    states_are_the_same = torch.equal(states, right)
    return {"drawn": drawn, "others": others, "others_alone": apart, "states_are_the_same": states_are_the_same}


def differing(mine: Sequence[int], expected: Sequence[int]) -> int:
    return sum(one != other for one, other in zip(mine, expected, strict=True))


def decode_step(kernels: TritonKernels, states: Tensor, batch: RaggedBatch) -> Callable[[], object]:
    """A step of plain sampling, from what the host knows to the copy of its tokens."""
    count = len(batch.slots)
    rows = np.zeros(count, ROW)
    rows["temperature"], rows["top_p"], rows["least"] = 0.8, 1, -np.inf
    tokens, positions = batch.tokens.tolist(), batch.positions.tolist()
    step = DecodeBatch(tokens, positions, batch.slots, rows, np.linspace(0, 0.999, count))
    return lambda: kernels.decode(states, step)
