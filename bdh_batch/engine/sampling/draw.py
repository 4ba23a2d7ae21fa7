"""Drawing the next token, vectorised over the batch; every row by its own parameters and its own random number.

A row's number is Philox4x32-10 (Salmon et al., SC 2011) of its seed and position, so neither the order of requests
nor who shares the batch can change it. Rows are always walked in token order, whatever filters other rows use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bdh_batch.engine.sampling.masks import masked
from bdh_batch.engine.sampling.parameters import packed
from bdh_batch.kernels.drawing import NO_TOKEN, ROW, WORDS, Doubles, Draws, Rows, draw, finite
from bdh_batch.messages import SamplingParams

_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
Words = npt.NDArray[np.uint64]  # of 32 bits each: products fit


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    masks: Sequence[bytes | None] = (),
) -> list[int | None]:
    """Draws one token for each row of `logits` [rows, V] float32; None for a row that is not finite.

    Args:
        params: the sampling parameters of each row.
        positions: of the tokens to be drawn, in their sequences.
        masks: which tokens each row may draw, in the packed bits of `messages.Constraint`, or empty.
    """
    rows, uniform = numbers(params, positions)
    sent = torch.empty(WORDS, len(rows), dtype=torch.int64, pin_memory=logits.is_cuda)
    Draws.of(sent).write(rows, uniform)
    draws = Draws.of(sent.to(logits.device, non_blocking=True))
    is_finite = finite(logits)
    if any(mask is not None for mask in masks):
        logits = masked(logits, masks).nan_to_num()  # a row of which all is refused is one of equal tokens
    tokens = draw(logits, draws, filters=bool(rows["kept"].any()))
    return drawn_tokens(tokens.masked_fill(~is_finite, NO_TOKEN).tolist())


def drawn_tokens(tokens: Sequence[int]) -> list[int | None]:
    """With None for NO_TOKEN."""
    return [None if token == NO_TOKEN else token for token in tokens]


def numbers(params: Sequence[SamplingParams], positions: Sequence[int]) -> tuple[Rows, Doubles]:
    """What rows are drawn by: their records, and their random numbers for tokens at those positions."""
    rows = np.frombuffer(packed(params), ROW)
    return rows, uniforms(rows["seed"], positions)


def uniforms(seeds: Sequence[int] | Words, positions: Sequence[int]) -> Doubles:
    """Float64 numbers [rows] in [0, 1) with 53 random bits, one per seed (64 bits) and position (64 bits)."""
    (seed_low, seed_high), (low, high) = words(seeds), words(positions)
    nothing = np.zeros_like(low)
    first, second, *_ = philox([low, high, nothing, nothing], [seed_low, seed_high])
    found: Doubles = ((first >> 5) * 2.0**26 + (second >> 6)) * 2.0**-53
    return found


def words(values: Sequence[int] | Words) -> tuple[Words, Words]:
    """The low and the high 32 bits of each."""
    whole = np.array(values, np.uint64)
    return whole & _WORD, whole >> _HALF


def philox(counter: Sequence[Words], key: Sequence[Words], rounds: int = 10) -> tuple[Words, ...]:
    """Philox4x32: four arrays of 32-bit words from a counter of four and a key of two.

    On the host: a hundred operations on a few numbers each are little for numpy, and much for a device to launch.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = product1 >> _HALF ^ c1 ^ k0, product1 & _WORD
        c2, c3 = product0 >> _HALF ^ c3 ^ k1, product0 & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3
