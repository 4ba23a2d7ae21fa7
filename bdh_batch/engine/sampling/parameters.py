"""Sampling parameters as numbers: a record for each row, for whatever draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from bdh_batch.kernels.drawing import COLDEST, ROW
from bdh_batch.messages import SamplingParams

ALL = 2**62  # tokens, more than any vocabulary has
KNOWN = 4096  # rows' parameters whose numbers are kept; not the parameters, which may have a large bias


def packed(params: Sequence[SamplingParams]) -> bytearray:
    """The records of rows, each a `kernels.drawing.ROW`, one behind the other."""
    return bytearray().join([_packed(p.temperature, p.top_p, p.top_k, p.min_p, p.seed) for p in params])


@lru_cache(maxsize=KNOWN)
def _packed(temperature: float, top_p: float, top_k: int, min_p: float, seed: int) -> bytes:
    temperature = max(temperature, COLDEST) if temperature > 0 else 0.0
    rounded = torch.tensor([temperature, top_p])  # to float32
    least = torch.tensor([min_p]).log() if min_p > 0 else -math.inf
    kept = (min(top_k, ALL) or ALL) if top_k > 0 or top_p < 1 else 0
    return np.array((*rounded.tolist(), float(least), 0.0, kept, seed), ROW).tobytes()
