"""Draws tokens from logits on a device, each row by its own numbers: operators on arrays alone.

Their shapes follow from the shapes of what they are given, and none of them waits for the device, so a graph can hold
them. A row's random number comes from the host: Philox is a hundred operations on a few numbers each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_TOKEN = -1
COLDEST = 1e-30  # temperature: by less, float32 could not divide

# A row's sampling parameters in main memory: `kept` is how many of the likeliest tokens stay at most, 0 where neither
# top_k nor top_p filters; `least` is the scaled logit below which min_p drops a token, −∞ without it.
ROW = np.dtype(
    [("temperature", "f4"), ("top_p", "f4"), ("least", "f4"), ("unused", "f4"), ("kept", "i8"), ("seed", "u8")]
)
WORDS = ROW.itemsize // 8  # of 8 bytes
Rows = np.ndarray[Any, np.dtype[np.void]]  # [R] of ROW
Doubles = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Draws:
    """How the token of each of R rows is drawn: views of one array, which is sent in one copy."""

    uniform: Tensor  # [R] float64 in [0, 1), the random numbers
    kept: Tensor  # [R] int64, as in ROW
    temperature: Tensor  # [R] float32, at least COLDEST; 0 takes the likeliest
    top_p: Tensor  # [R] float32
    least: Tensor  # [R] float32, as in ROW

    @classmethod
    def of(cls, words: Tensor) -> Draws:
        """The views of `words` [WORDS, R] int64: `uniform` takes as much as a seed."""
        rows = words.shape[1]
        temperature, top_p, least, _ = words[2:].reshape(-1).view(torch.float32).view(4, rows)
        return cls(words[0].view(torch.float64), words[1], temperature, top_p, least)

    def write(self, rows: Rows, uniform: Doubles) -> None:
        """Writes the first of them, where they lie in main memory."""
        self.uniform.numpy()[: len(rows)] = uniform
        for field in fields(self)[1:]:
            getattr(self, field.name).numpy()[: len(rows)] = rows[field.name]


def finite(logits: Tensor) -> Tensor:
    """Which rows of `logits` [R, V] have no NaN and no infinity: [R] bool."""
    return (logits * 0).sum(dim=-1) == 0


def draw(logits: Tensor, draws: Draws, filters: bool) -> Tensor:
    """Draws a token for each row of `logits` [R, V] float32, which are finite: [R] int64.

    Args:
        filters: whether any row has `kept`; where none has, nothing is sorted. No row's token depends on it.
    """
    hot = draws.temperature > 0
    largest, likeliest = logits.max(dim=-1, keepdim=True)
    scaled = (logits - largest) / draws.temperature.clamp(min=COLDEST)[:, None]  # the likeliest stays at 0
    scaled = scaled.masked_fill(scaled < draws.least[:, None], -torch.inf)
    if filters:
        scaled = _keep_likely(scaled, draws)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Rounding must not reach past the last token that has any probability: scale by the sum, stay below it.
    target = torch.minimum(draws.uniform[:, None] * total, total * (1 - 1e-12))
    drawn = torch.searchsorted(cumulative, target, right=True)
    return torch.where(hot[:, None], drawn, likeliest).squeeze(-1)


def _keep_likely(scaled: Tensor, draws: Draws) -> Tensor:
    """With all but the `kept` likeliest tokens, then all but the likeliest that together reach `top_p`, at −∞."""
    kept, ranks = draws.kept[:, None], torch.arange(scaled.shape[-1], device=scaled.device)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(ranks >= kept, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    # In float64: a GPU cuts its sums by how many rows there are, which rounding to float32 hides.
    ahead = probabilities.cumsum(dim=-1, dtype=torch.float64).float() - probabilities
    beyond = (ahead >= draws.top_p[:, None]) & (ranks > 0)  # the likeliest always stays
    likely = torch.empty_like(scaled).scatter_(-1, order, ordered.masked_fill(beyond, -torch.inf))
    return torch.where(kept > 0, likely, scaled)
