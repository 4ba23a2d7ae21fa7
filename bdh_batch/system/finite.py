"""Whether numbers in a piece of memory are finite, by the names that safetensors has for their dtypes."""

from __future__ import annotations

import numpy as np

EXPONENT = np.uint16(0x7F80)  # of a bfloat16, which numpy does not know: where all its bits are set, it is not finite


def is_finite(piece: bytes | memoryview, dtype: str) -> bool:
    """Whether all numbers of a piece are finite.

    Args:
        piece: a whole number of numbers.
        dtype: `F32`, or `BF16`.
    """
    if dtype == "F32":
        return bool(np.isfinite(np.frombuffer(piece, np.float32)).all())
    return not np.any((np.frombuffer(piece, np.uint16) & EXPONENT) == EXPONENT)
