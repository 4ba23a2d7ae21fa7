"""Properties of the specification itself."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, strategies as st

from bdh_batch.checkpoint.config import rope_frequencies
from bdh_batch.kernels.torch_reference import rotate, rotation


@pytest.mark.parametrize("position", [0, 1, 12_345, 1_000_003, 123_456_789, 2**29 - 1])
def test_phases_are_exact_at_any_position(position: int) -> None:
    frequencies = rope_frequencies(64)
    cos, sin = rotation(frequencies, torch.tensor([position]))
    for pair, frequency in enumerate(frequencies[::2].tolist()):
        turns = float(Fraction(frequency) * position % 1)
        assert cos[0, pair].item() == pytest.approx(math.cos(2 * math.pi * turns), abs=1e-7)
        assert sin[0, pair].item() == pytest.approx(math.sin(2 * math.pi * turns), abs=1e-7)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_a_token_reads_of_another_depends_on_their_distance_only(position: int, distance: int) -> None:
    generator = torch.Generator().manual_seed(position)
    q, k = torch.rand(2, 1, 64, generator=generator)

    def score(at: int) -> float:
        cos, sin = rotation(rope_frequencies(64), torch.tensor([at, at + distance]))
        return float(rotate(q, cos[1:], sin[1:]) @ rotate(k, cos[:1], sin[:1]).T)

    assert score(0) == pytest.approx(score(position), abs=1e-4)
