"""The Triton kernels on models and batches of any shape. The other tests run where Hypothesis is not installed, too."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings, strategies as st

from bdh_batch.kernels.base import Weights
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import VARIANTS, alone, feed, model, states_for, variant
from tests.kernels.test_triton import TOLERANCE, Poisoned, states_on_device, text

pytestmark = pytest.mark.no_cover  # tracing would more than double what the interpreter takes

properties = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def models(draw: st.DrawFn, layers: int = 2) -> Weights:
    heads, width = draw(st.integers(1, 2)), draw(st.sampled_from([2, 15, 17, 32]))
    multiplier = draw(st.sampled_from([2, 4])) * heads
    config = model(draw(st.integers(1, layers)), heads, width, multiplier * width // heads, draw(st.integers(2, 40)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    weights = synthetic_weights(config, density, seed=draw(st.integers(0, 9)))
    return variant(weights, draw(st.sampled_from(VARIANTS)))


@properties
@given(weights=models(), lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_agrees_with_the_specification(weights: Weights, lengths: list[int], seed: int) -> None:
    """Any kind, shape and density, odd sizes too, any ragged batch, then a decode step on the states that it left."""
    sequences = {slot: text(length + 1, len(weights.embed), seed + slot) for slot, length in enumerate(lengths)}
    mine, right = states_on_device(weights, len(lengths)), states_for(weights, len(lengths))
    kernels = Poisoned(weights)
    prompts = [(slot, 0, length) for slot, length in enumerate(lengths)]
    steps = [(slot, length, length + 1) for slot, length in enumerate(lengths)]
    for pieces in (prompts, steps):
        got = torch.cat(feed(kernels, mine, sequences, pieces))
        expected = torch.cat(feed(TorchKernels(weights), right, sequences, pieces))
        assert torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * scale(expected))
        assert torch.allclose(mine.cpu(), right, rtol=TOLERANCE, atol=TOLERANCE * scale(right))


def scale(values: Tensor) -> float:
    """Of what is there; where all cancels out, as it can at a width of 2, only rounding is left to be seen."""
    return max(float(values.abs().max()), 1e-3)


@properties
@given(weights=models(layers=1), seed=st.integers(0, 99))
def test_the_same_bits_in_any_company(weights: Weights, seed: int) -> None:
    """Logits and state of the same pieces: alone, and among others, in another slot and position."""
    generator = np.random.default_rng(seed)
    kernels = Poisoned(weights)
    rows = {slot: text(19, len(weights.embed), seed + slot) for slot in range(3)}
    cuts = {slot: [0, *sorted(generator.choice(np.arange(1, 19), 2, replace=False).tolist()), 19] for slot in rows}
    crowd = states_on_device(weights, 3)
    logits: dict[int, list[Tensor]] = {slot: [] for slot in rows}
    for step in range(3):
        chosen = generator.permutation(3).tolist()
        pieces = [(slot, cuts[slot][step], cuts[slot][step + 1]) for slot in chosen]
        for slot, part in zip(chosen, feed(kernels, crowd, rows, pieces)):
            logits[slot].append(part)
    single = states_on_device(weights, 1)
    assert torch.equal(alone(kernels, single, rows[2], 0, cuts[2][1:-1]), torch.cat(logits[2]))
    assert torch.equal(single[0], crowd[2])
