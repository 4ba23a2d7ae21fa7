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
from bdh_batch.messages import SamplingParams

COLDEST = 1e-30  # temperatures below are greedy, but float32 could not divide by them
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
    finite = torch.isfinite(logits).all(dim=-1)
    logits = masked(logits, masks)
    tokens = logits.argmax(dim=-1)
    hot = [row for row, p in enumerate(params) if p.temperature > 0]
    if hot:
        rows = torch.tensor(hot, device=logits.device)
        tokens[rows] = _draw(logits[rows].nan_to_num(), [params[row] for row in hot], [positions[row] for row in hot])
    return [token if ok else None for token, ok in zip(tokens.tolist(), finite.tolist())]


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    device = logits.device
    temperatures = torch.tensor([[max(p.temperature, COLDEST)] for p in params], device=device)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures  # the likeliest stays at 0, however cold
    bounded = [row for row, p in enumerate(params) if p.min_p > 0]
    if bounded:
        rows = torch.tensor(bounded, device=device)
        logits[rows] = _keep_near(logits[rows], [params[row].min_p for row in bounded])
    filtered = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        logits[rows] = _keep_likely(logits[rows], [params[row] for row in filtered])
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    uniform = uniforms([p.seed for p in params], positions, device)[:, None]
    # Rounding must not reach past the last token that has any probability: scale by the sum, stay below it.
    target = (uniform * cumulative[:, -1:]).clamp(max=cumulative[:, -1:] * (1 - 1e-12))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _keep_near(logits: Tensor, min_p: Sequence[float]) -> Tensor:
    """Sets tokens less than `min_p` times as likely as the likeliest, whose logit is 0, to −∞."""
    least = torch.tensor(min_p, device=logits.device)[:, None].log()
    return logits.masked_fill(logits < least, -torch.inf)


def _keep_likely(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Sets all but the `top_k` likeliest tokens, then all but the likeliest that together reach `top_p`, to −∞."""
    vocabulary = logits.shape[-1]
    top_k = torch.tensor([[min(p.top_k or vocabulary, vocabulary)] for p in params], device=logits.device)
    top_p = torch.tensor([[p.top_p] for p in params], device=logits.device)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered[torch.arange(vocabulary, device=logits.device) >= top_k] = -torch.inf
    probabilities = ordered.softmax(dim=-1)
    ahead = probabilities.cumsum(dim=-1) - probabilities
    beyond = ahead >= top_p
    beyond[:, 0] = False  # the likeliest always stays
    return torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill_(beyond, -torch.inf))


def uniforms(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> Tensor:
    """Float64 numbers [rows] in [0, 1) with 53 random bits, one per seed (64 bits) and position (64 bits)."""
    (seed_low, seed_high), (low, high) = words(seeds), words(positions)
    nothing = np.zeros_like(low)
    first, second, *_ = philox([low, high, nothing, nothing], [seed_low, seed_high])
    return torch.from_numpy(((first >> 5) * 2.0**26 + (second >> 6)) * 2.0**-53).to(device)


def words(values: Sequence[int]) -> tuple[Words, Words]:
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
