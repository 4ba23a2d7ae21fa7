"""Weights of int8: the CPU kernels against the specification, in any company, at the ends of the integers' range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from bdh_batch.checkpoint import int8
from bdh_batch.kernels import cpu_layout, simd, simd_terms as terms
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.select import select_kernels
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.kernels.vector import LANES
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import (
    VARIANTS,
    alone,
    distance,
    feed,
    in_a_crowd,
    model,
    quantized,
    states_for,
    text,
    variant,
)

TOLERANCE = 1e-3  # inputs are rounded to 16 bits; the specification leaves them as they are


@st.composite
def models(draw: st.DrawFn) -> Weights:
    heads, width = draw(st.integers(1, 3)), draw(st.sampled_from([6, 15, 16, 33, 48, 64]))
    config = model(draw(st.integers(1, 3)), heads, width, 4 * width, draw(st.integers(2, 70)))
    weights = synthetic_weights(config, draw(st.sampled_from([0.05, 0.3, 0.9])), seed=draw(st.integers(0, 9)))
    return quantized(variant(weights, draw(st.sampled_from(VARIANTS))))


@settings(max_examples=15, deadline=None)
@given(weights=models(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_mathematics_of_the_specification_and_the_same_bits_in_any_company(
    weights: Weights, lengths: list[int], seed: int
) -> None:
    """Of any kind and shape, in random ragged pieces among others, alone as a whole, and token by token."""
    generator, kernels = np.random.default_rng(seed), CpuKernels(weights)
    rows = {slot: text(length, len(weights.embed), seed + slot) for slot, length in enumerate(lengths)}
    crowd = states_for(weights, len(lengths))
    logits = in_a_crowd(kernels, crowd, rows, generator, longest=30)
    for slot, row in rows.items():
        single = states_for(weights, 1)
        assert torch.equal(alone(kernels, single, row, 0, []), logits[slot])
        assert torch.equal(single[0], crowd[slot])
    expected = alone(TorchKernels(weights), states_for(weights, 1), rows[0], 0, [])
    assert distance(logits[0], expected) <= TOLERANCE
    assert torch.equal(alone(kernels, states_for(weights, 1), rows[0], 0, range(1, len(rows[0]))), logits[0])


def test_a_weight_is_a_byte_and_the_start_says_how_it_is_multiplied() -> None:
    weights = quantized(synthetic_weights(model(3, 2, 64, 128, 60), 0.3))
    kernels, reason = select_kernels("auto", weights, 0)
    assert isinstance(kernels, CpuKernels)
    assert reason.endswith("weights of int8 stay so, and are multiplied with inputs of int16")
    packed = kernels._packed.encoder, kernels._packed.encoder_v, kernels._packed.decoder
    assert sum(array.nbytes for array in packed) == 3 * weights.encoder.numel()


def test_it_is_the_model_that_was_rounded() -> None:
    """As near as 127 steps for each sign allow, and no other one."""
    weights = synthetic_weights(model(2, 2, 64, 128, 60), 0.3)
    narrow = quantized(weights)
    assert narrow.scales is not None
    wide: dict[str, Any] = {
        name: int8.widen(getattr(narrow, name), getattr(narrow.scales, name), -1 if name == "decoder" else -2)
        for name in ("encoder", "encoder_v", "decoder", "lm_head")
    }
    same = replace(weights, **wide)
    tokens = text(60, 60)
    got = alone(CpuKernels(narrow), states_for(narrow, 1), tokens, 0, [20, 21])
    assert distance(got, alone(TorchKernels(same), states_for(same, 1), tokens, 0, [])) <= TOLERANCE
    assert distance(got, alone(TorchKernels(weights), states_for(weights, 1), tokens, 0, [])) <= 0.1


@pytest.mark.parametrize("width", [16, 1040])
def test_no_sum_of_integers_overflows(width: int) -> None:
    """Inputs and weights as large as they can be, all of one sign. From 517 on inputs have fewer steps than 2¹⁵."""
    weights = quantized(synthetic_weights(model(1, 1, width, 2 * width, 40), 0.3))
    assert weights.scales is not None
    weights = replace(weights, lm_head=torch.full_like(weights.lm_head, -127))
    hidden = torch.stack([torch.full((width,), size) for size in (1.0, -3e30, 1e-30, 0.0)])
    expected = TorchKernels(weights).logits(hidden)
    torch.testing.assert_close(CpuKernels(weights).logits(hidden), expected, rtol=1e-4, atol=0)
    shape = cpu_layout.shape_of(weights, 0, pairs=True)
    assert shape.largest_input * width * cpu_layout.LARGEST_WEIGHT < 2**31


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_no_number_shows_and_stays_with_its_sequence(broken: float) -> None:
    weights = quantized(synthetic_weights(model(2, 2, 17, 34, 40), 0.5))
    sequences = {slot: text(9, 40, slot) for slot in range(3)}
    pieces = [(0, 0, 1), (1, 0, 9), (2, 0, 1)]
    states = states_for(weights, 3)
    states[1] = broken
    first, spoilt, last = feed(CpuKernels(weights), states, sequences, pieces)
    assert spoilt.isnan().all()
    right = feed(CpuKernels(weights), states_for(weights, 3), sequences, pieces)
    assert torch.equal(first, right[0])
    assert torch.equal(last, right[2])
    hidden = torch.tensor([[broken] + 16 * [1.0], 17 * [1.0]])
    assert CpuKernels(weights).logits(hidden).isfinite().all(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("instruction", [True, False], ids=["one instruction", "any processor"])
def test_pairs_are_multiplied_the_same_on_any_processor(instruction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if instruction and not terms.has("avx512bw"):
        pytest.skip("this processor has no avx512bw")
    monkeypatch.setattr(terms, "has", lambda feature: instruction)

    def multiply(inputs: Any, weights: Any, out: Any) -> None:
        sums = terms.multiply_add(terms.load(inputs, 0), terms.load(weights, 0), simd.splat(np.float32(0)))
        sums = terms.multiply_add(terms.spread(inputs, 3), terms.load(weights, 0), sums)
        simd.store(out, 0, terms.total(weights, sums))

    compiled: Callable[..., None] = numba.njit(multiply)
    generator = np.random.default_rng(0)
    inputs = generator.integers(-(2**15) + 1, 2**15, 2 * LANES, np.int16)
    weights = generator.integers(-128, 128, 2 * LANES, np.int8)
    inputs[:4], weights[:4] = [32767, -32767, 32767, 32767], [-128, 127, -128, -128]
    out = np.empty(LANES, np.float32)
    compiled(inputs.view(np.int32), weights.view(np.uint16), out)
    products = inputs.astype(np.int64).reshape(-1, 2) + inputs.reshape(-1, 2)[3].astype(np.int64)
    expected = (products * weights.astype(np.int64).reshape(-1, 2)).sum(axis=1)
    assert np.array_equal(out, expected.astype(np.float32))


def test_a_latent_step_and_a_frozen_state() -> None:
    weights = quantized(synthetic_weights(model(2, 2, 32, 64, 40), 0.3))
    kernels, states = CpuKernels(weights), states_for(weights, 1)
    feed(kernels, states, {0: text(9, 40)}, [(0, 0, 9)])
    before = states.clone()
    vectors = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    batch = RaggedBatch(torch.tensor([-1]), torch.tensor([9]), [0, 1], [0], vectors=vectors, frozen=[True])
    got = kernels.forward(states, batch)
    assert torch.equal(states, before)
    assert distance(got, TorchKernels(weights).forward(before, batch)) <= TOLERANCE
