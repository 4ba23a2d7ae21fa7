"""What the kernel tests share: ragged batches from sequences, the two implementations, poison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_batch.checkpoint import int8
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.kernels.base import Kernels, RaggedBatch, Scales, Weights
from bdh_batch.kernels.cpu import CpuKernels

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"
CPU = torch.device("cpu")
UPSTREAM, ALL_AT_ONCE = "upstream", "all at once"
VARIANTS = (UPSTREAM, "final norm", "matrices by layer", "partial rotary", "base 10,000", ALL_AT_ONCE)

# The GPU's own first: what its arithmetic gives for 0 · ∞.
NOT_NUMBERS = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0xFFC00000, 0x7F80FFFF, 0x7FFF8000]

Piece = tuple[int, int, int]  # slot, first and last position of a share of a sequence


def text(length: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def states_for(weights: Weights, slots: int, window: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    _, heads, width, neurons = weights.encoder.shape
    blocks = (2,) if window else ()
    return torch.zeros(slots, weights.layers, *blocks, heads, neurons, width, dtype=dtype)


def variant(weights: Weights, name: str) -> Weights:
    """Upstream's weights as those of another kind of BDH, one of `VARIANTS`, that fires about as often."""
    chosen = VARIANTS[1:-1] if name == ALL_AT_ONCE else (name,)
    neurons = weights.encoder.shape[-1]
    if "final norm" in chosen:
        weights = replace(weights, final_norm=True)
    if "matrices by layer" in chosen:
        layers = range(weights.layers)
        weights = replace(
            weights,
            encoder=torch.cat([weights.encoder.roll(layer, -1) for layer in layers]),
            encoder_v=torch.cat([weights.encoder_v.roll(-layer, -1) for layer in layers]),
            decoder=torch.cat([weights.decoder.roll(2 * layer, -2) for layer in layers]),
        )
    if "base 10,000" in chosen:
        pairs = torch.arange(neurons) // 2 * 2
        weights = replace(weights, frequencies=10_000.0 ** -(pairs / neurons) / (2 * math.pi))
    if "partial rotary" in chosen:
        turns = torch.arange(neurons) < neurons // 8 * 2
        weights = replace(weights, frequencies=weights.frequencies * turns)
    return weights


def quantized(weights: Weights) -> Weights:
    """The same rounded to int8."""
    axes = {"encoder": -2, "encoder_v": -2, "decoder": -1, "lm_head": -2}
    pairs = {name: int8.quantize(getattr(weights, name), axis) for name, axis in axes.items()}
    scales = Scales(**{name: scales for name, (_, scales) in pairs.items()})
    integers: dict[str, Any] = {name: integers for name, (integers, _) in pairs.items()}
    return replace(weights, embed=weights.embed.float(), scales=scales, **integers)


def feed(
    kernels: Kernels,
    states: Tensor,
    sequences: dict[int, Tensor],
    pieces: Sequence[Piece],
    draws: Sequence[bool] = (),
) -> list[Tensor]:
    """The logits of each piece of the sequences, keyed by slot, after one step with all of them."""
    poison(kernels)
    parts = [sequences[slot][begin:end] for slot, begin, end in pieces]
    bounds = [0, *np.cumsum([len(part) for part in parts]).tolist()]
    batch = RaggedBatch(
        tokens=torch.cat(parts),
        positions=torch.cat([torch.arange(begin, end) for _, begin, end in pieces]),
        bounds=bounds,
        slots=[slot for slot, _, _ in pieces],
        draws=draws,
    )
    hidden = kernels.forward(states, batch)
    poison(kernels)
    return list(torch.split(kernels.logits(hidden), [len(part) for part in parts]))


def alone(kernels: Kernels, states: Tensor, tokens: Tensor, slot: int, cuts: Sequence[int]) -> Tensor:
    """The logits of a whole sequence, fed by itself in pieces that end at `cuts`."""
    ends = [*cuts, len(tokens)]
    logits = [feed(kernels, states, {slot: tokens}, [(slot, b, e)])[0] for b, e in zip([0, *cuts], ends)]
    return torch.cat(logits)


def in_a_crowd(
    kernels: Kernels, states: Tensor, sequences: dict[int, Tensor], generator: np.random.Generator, longest: int
) -> dict[int, Tensor]:
    """The logits of sequences, keyed by slot, fed in random ragged pieces in a random order until all are through."""
    done = dict.fromkeys(sequences, 0)
    logits: dict[int, list[Tensor]] = {slot: [] for slot in sequences}
    while waiting := [slot for slot in sequences if done[slot] < len(sequences[slot])]:
        chosen = generator.permutation(waiting)[: generator.integers(1, len(waiting) + 1)].tolist()
        pieces = []
        for slot in chosen:
            length = 1 if generator.random() < 0.5 else int(generator.integers(1, longest + 1))
            pieces.append((slot, done[slot], min(done[slot] + length, len(sequences[slot]))))
        for (slot, _, end), part in zip(pieces, feed(kernels, states, sequences, pieces)):
            logits[slot].append(part)
            done[slot] = end
    return {slot: torch.cat(parts) for slot, parts in logits.items()}


def poison(kernels: Kernels) -> None:
    """Leaves nothing in the buffers that a step could mistake for its own."""
    if isinstance(kernels, CpuKernels):
        for array in (*kernels._work, *kernels._scratch):
            array.fill(np.nan if array.dtype == np.float32 else 7)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def model(layers: int, heads: int, width: int, neurons: int, vocabulary: int) -> BDHConfig:
    """`neurons` of a head must be such that upstream's multiplier is whole."""
    multiplier, rest = divmod(neurons * heads, width)
    assert rest == 0
    return BDHConfig(layers, width, heads, multiplier, vocabulary, 0.0)


def floats_of(bits: Sequence[int]) -> Tensor:
    """float32 numbers by their bits."""
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32).copy())
