"""States in bfloat16: how they are rounded, that the bits are the same in any company, and what it costs in loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.kernels import simd, simd_state, vector
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.cpu_layout import Floats, Longs, States
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import (
    ALL_AT_ONCE,
    CPU,
    NOT_NUMBERS,
    UPSTREAM,
    alone,
    distance,
    floats_of,
    in_a_crowd,
    model,
    states_for,
    text,
    variant,
)

TOLERANCE = 3e-2  # bfloat16 keeps 8 bits
BUNDLED = Path(__file__).parents[2] / "models" / "bdh-shakespeare"
VALIDATION = Path(__file__).parents[1] / "data" / "shakespeare-validation.txt"


@vector.compiled
def round_all(values: Floats, states: States, seeds: Longs) -> None:
    """The 16 `values`, once for each seed."""
    for i in range(len(seeds)):
        noise = simd_state.vary(simd_state.noise(seeds[i]), 128 * i)
        simd_state.store_state(states, i * vector.LANES, simd.load(values, 0), noise)


def test_rounds_up_as_often_as_the_dropped_part_says() -> None:
    """So sums of many small numbers come out right on average, where rounding to the nearest would lose them all."""
    below = torch.linspace(1, 3, vector.LANES).bfloat16()
    above = torch.nextafter(below, torch.tensor(torch.inf, dtype=torch.bfloat16)).float()
    share = torch.linspace(0, 1, vector.LANES)
    values = below.float() + share * (above - below.float())
    seeds = np.arange(20_000)
    states = torch.empty(len(seeds), vector.LANES, dtype=torch.bfloat16)
    round_all(values.numpy(), states.view(-1).view(torch.uint16).numpy(), seeds)
    went_up = (states.float() == above).float()
    assert ((states == below) | (went_up == 1)).all()
    assert (went_up.mean(0) - share).abs().max() < 0.02


def test_what_is_no_number_stays_none_and_infinity_stays_what_it_is() -> None:
    values = torch.cat([floats_of(NOT_NUMBERS), torch.tensor([torch.inf, -torch.inf] * 4)])
    seeds = np.arange(5_000)
    states = torch.empty(len(seeds), vector.LANES, dtype=torch.bfloat16)
    round_all(values.numpy(), states.view(-1).view(torch.uint16).numpy(), seeds)
    assert states[:, :8].isnan().all()
    assert (states[:, 8:].float() == values[8:]).all()


@pytest.mark.parametrize("width", [15, 48])
@pytest.mark.parametrize("window", [0, 12])
def test_agrees_with_the_specification(width: int, window: int) -> None:
    weights = synthetic_weights(model(3, 2, width, 2 * width, 60), 0.3)
    tokens = text(100, 60)
    states = [states_for(weights, 1, window, torch.bfloat16) for _ in range(2)]
    got = alone(CpuKernels(weights, window), states[0], tokens, 0, [50, 51])
    expected = alone(TorchKernels(weights, window), states[1], tokens, 0, [50, 51])
    exact = alone(TorchKernels(weights, window), states_for(weights, 1, window), tokens, 0, [])
    assert distance(got, expected) <= TOLERANCE
    assert distance(got, exact) <= TOLERANCE
    assert distance(states[0], states[1]) <= TOLERANCE


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.sampled_from([6, 17, 48]),
    window=st.sampled_from([0, 12]),
    seed=st.integers(0, 99),
    kind=st.sampled_from([UPSTREAM, ALL_AT_ONCE]),
)
def test_the_same_bits_in_any_company_and_any_pieces(width: int, window: int, seed: int, kind: str) -> None:
    weights = variant(synthetic_weights(model(2, 2, width, 2 * width, 40), 0.4), kind)
    kernels = CpuKernels(weights, window)
    sequences = {4: text(50, 40, seed), 0: text(33, 40, seed + 1), 2: text(9, 40, seed + 2)}
    crowd = states_for(weights, 5, window, torch.bfloat16)
    logits = in_a_crowd(kernels, crowd, sequences, np.random.default_rng(seed), longest=40)
    for slot, row in sequences.items():
        single = states_for(weights, 1, window, torch.bfloat16)
        assert torch.equal(alone(kernels, single, row, 0, []), logits[slot])
        assert torch.equal(single[0], crowd[slot])


@pytest.mark.parametrize(("window", "most"), [(512, 0.002), (1024, 0.01)])
def test_the_loss_of_the_trained_model_stays(window: int, most: float) -> None:
    """Over a context of 4,096 real bytes, with the window that the model's folder asks for, and with one in which the
    model is so sensitive that rounding to the nearest loses 0.03. `python -m benchmarks.engine.loss` reads more."""
    bundled = load_model(BUNDLED, torch.float32, CPU)
    kernels = CpuKernels(bundled.weights, window)
    read = torch.tensor(list(VALIDATION.read_bytes()[:4097]))
    losses = {
        dtype: loss(kernels, states_for(bundled.weights, 1, window, dtype), read)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert abs(losses[torch.bfloat16] - losses[torch.float32]) <= most


def loss(kernels: CpuKernels, states: Tensor, tokens: Tensor) -> Tensor:
    logits = alone(kernels, states, tokens[:-1], 0, [])
    return F.cross_entropy(logits, tokens[1:])
