"""The CPU kernels against the specification: shapes, densities, dtypes, and the same bits in any company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from bdh_batch.kernels import cpu, cpu_layout, cpu_state, cpu_step, simd_terms, vector
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.select import select_kernels
from bdh_batch.kernels.torch_reference import TorchKernels, rotation
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import (
    VARIANTS,
    alone,
    distance,
    feed,
    in_a_crowd,
    model,
    poison,
    quantized,
    states_for,
    text,
    variant,
)

TOLERANCE = 1e-5
# Rounding of the weights is the same; that of what products give back is the specification's alone.
TOLERANCE_OF = {torch.float32: TOLERANCE, torch.bfloat16: 3e-2, torch.float16: 4e-3}
TOLERANCE_OF_INT8 = 1e-3
properties = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FLOAT32 = st.just(torch.float32)


@st.composite
def models(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = FLOAT32) -> Weights:
    heads, width = draw(st.integers(1, 4)), draw(st.sampled_from([6, 15, 16, 17, 33, 48, 64]))
    multiplier = draw(st.sampled_from([2, 4, 6])) * heads
    config = model(draw(st.integers(1, 3)), heads, width, multiplier * width // heads, draw(st.integers(2, 70)))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]))
    weights = synthetic_weights(config, density, seed=draw(st.integers(0, 9)), dtype=draw(dtypes))
    return variant(weights, draw(st.sampled_from(VARIANTS)))


@properties
@given(weights=models(), lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_agrees_with_the_specification(weights: Weights, lengths: list[int], seed: int) -> None:
    """Any kind and shape, odd sizes included, any density and ragged batch, then a decode step on the states left."""
    sequences = {slot: text(length + 1, len(weights.embed), seed + slot) for slot, length in enumerate(lengths)}
    mine, right = states_for(weights, len(lengths)), states_for(weights, len(lengths))
    prompts = [(slot, 0, length) for slot, length in enumerate(lengths)]
    steps = [(slot, length, length + 1) for slot, length in enumerate(lengths)]
    for pieces in (prompts, steps):
        got = torch.cat(feed(CpuKernels(weights), mine, sequences, pieces))
        expected = torch.cat(feed(TorchKernels(weights), right, sequences, pieces))
        assert (got - expected).norm() <= TOLERANCE * expected.norm()
        assert (mine - right).norm() <= TOLERANCE * right.norm()


@pytest.mark.parametrize("width", [15, 48, 80])
@pytest.mark.parametrize("dtype", list(TOLERANCE_OF))
def test_weights_of_each_dtype(dtype: torch.dtype, width: int) -> None:
    weights = synthetic_weights(model(3, 2, width, 2 * width, 60), 0.3, dtype=dtype)
    tokens = text(80, 60)
    got = alone(CpuKernels(weights), states_for(weights, 1), tokens, 0, [50, 60])
    expected = alone(TorchKernels(weights), states_for(weights, 1), tokens, 0, [50, 60])
    assert distance(got, expected) <= TOLERANCE_OF[dtype]


@pytest.mark.parametrize("multiplies", [True, False])
def test_weights_of_bfloat16_stay_so_where_the_processor_multiplies_them(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half the memory, with the same mathematics; elsewhere they are widened, and the start says so."""
    if multiplies and not simd_terms.multiplies_pairs():
        pytest.skip("this processor has no avx512_bf16")
    weights = synthetic_weights(model(3, 2, 64, 128, 60), 0.3, dtype=torch.bfloat16)
    tokens = text(80, 60)
    monkeypatch.setattr(simd_terms, "multiplies_pairs", lambda: multiplies)
    kernels, reason = select_kernels("cpu", weights, 0)
    assert isinstance(kernels, CpuKernels)
    assert ("stay so, and are multiplied by avx512_bf16" if multiplies else "are widened to float32") in reason
    packed = kernels._packed.encoder, kernels._packed.encoder_v, kernels._packed.decoder
    assert sum(array.nbytes for array in packed) == 3 * weights.encoder.numel() * (2 if multiplies else 4)
    expected = alone(TorchKernels(weights), states_for(weights, 1), tokens, 0, [])
    assert distance(alone(kernels, states_for(weights, 1), tokens, 0, [50, 60]), expected) <= 3e-2


@properties
@given(
    weights=models(st.sampled_from([torch.float32, torch.bfloat16])),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
def test_the_same_bits_in_any_company_and_any_pieces(weights: Weights, lengths: list[int], seed: int) -> None:
    """Logits and state: alone as a whole, and among others in random ragged pieces, in other slots and positions."""
    generator = np.random.default_rng(seed)
    kernels = CpuKernels(weights)
    slots = generator.permutation(len(lengths) + 3)[: len(lengths)].tolist()
    rows = [text(length, len(weights.embed), seed + index) for index, length in enumerate(lengths)]
    crowd = states_for(weights, len(lengths) + 3)
    logits = in_a_crowd(kernels, crowd, dict(zip(slots, rows)), generator, longest=40)
    for slot, row in zip(slots, rows):
        single = states_for(weights, 1)
        assert torch.equal(alone(kernels, single, row, 0, []), logits[slot])
        assert torch.equal(single[0], crowd[slot])


def test_the_same_bits_with_more_tokens_than_a_round_holds() -> None:
    weights = synthetic_weights(model(2, 2, 32, 64, 40), 0.3)
    kernels = CpuKernels(weights)
    sequences = {slot: text(length, 40, slot) for slot, length in enumerate((1, cpu_layout.MAX_TOKENS + 50, 3, 200, 1))}
    together = feed(
        kernels, states_for(weights, 5), sequences, [(slot, 0, len(row)) for slot, row in sequences.items()]
    )
    for slot, logits in enumerate(together):
        tokens = sequences[slot]
        assert torch.equal(alone(kernels, states_for(weights, 1), tokens, 0, range(1, len(tokens))), logits)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    weights = synthetic_weights(model(2, 3, 32, 64, 40), 0.3)
    sequences = {slot: text(30, 40, slot) for slot in range(7)}
    pieces = [(slot, 0, 1 if slot % 2 else 30) for slot in sequences]
    usual = feed(CpuKernels(weights), states_for(weights, 7), sequences, pieces)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        other = feed(CpuKernels(weights), states_for(weights, 7), sequences, pieces)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(usual), torch.cat(other))


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(1, torch.float32), (3, torch.float32), (64, torch.float32), (3, torch.bfloat16), (3, torch.int8)],
)
def test_logits_of_a_large_vocabulary_have_the_same_bits_on_any_number_of_threads(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = dtype == torch.int8
    weights = synthetic_weights(model(1, 1, 32, 64, 40_013), 0.3, dtype=torch.float32 if narrow else dtype)
    weights = quantized(weights) if narrow else weights
    hidden = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
    shared: list[int] = []
    project = cpu.StepThreads.project

    def counted(step_threads: cpu.StepThreads, *arguments: Any) -> None:
        shared.append(arguments[2])
        project(step_threads, *arguments)

    monkeypatch.setattr(cpu.StepThreads, "project", counted)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            kernels = CpuKernels(weights)
            poison(kernels)
            found.append(kernels.logits(hidden))
        finally:
            torch.set_num_threads(before)
    assert shared == ([] if rows == 1 else [rows])
    assert torch.equal(*found)
    expected = TorchKernels(weights).logits(hidden)
    assert distance(found[0], expected) <= TOLERANCE_OF.get(dtype, TOLERANCE_OF_INT8)
    for row in range(rows):
        assert torch.equal(kernels.logits(hidden[row : row + 1])[0], found[0][row])


@pytest.mark.parametrize("width", [32, 17], ids=["full panels", "a panel that is not full"])
def test_a_broken_state_shows_and_stays_with_its_sequence(width: int) -> None:
    weights = synthetic_weights(model(2, 2, width, 2 * width, 40), 0.5)
    sequences = {slot: text(9, 40, slot) for slot in range(3)}
    pieces = [(0, 0, 1), (1, 0, 9), (2, 0, 1)]
    states = states_for(weights, 3)
    states[1] = torch.nan
    healthy, broken, other = feed(CpuKernels(weights), states, sequences, pieces)
    assert broken.isnan().all()
    right_states = states_for(weights, 3)
    right = feed(CpuKernels(weights), right_states, sequences, pieces)
    assert torch.equal(healthy, right[0])
    assert torch.equal(other, right[2])
    assert torch.equal(states[[0, 2]], right_states[[0, 2]])


def test_steady_batches_give_what_others_give() -> None:
    """How one is cut is kept for the next, until another number comes, or none."""
    weights = synthetic_weights(model(2, 2, 17, 34, 40), 0.5)
    kernels, states, wanted = CpuKernels(weights), states_for(weights, 6), states_for(weights, 6)
    for position, (number, slots) in enumerate([(1, [0, 1]), (1, [0, 1]), (0, [2]), (1, [0, 1]), (2, [3, 4, 5])]):
        tokens, positions = torch.arange(len(slots)) + position, torch.full((len(slots),), position)
        batch = RaggedBatch(tokens, positions, [*range(len(slots) + 1)], slots)
        plain = kernels.forward(wanted, batch)
        assert torch.equal(kernels.forward(states, replace(batch, steady=number)), plain)
    assert torch.equal(states, wanted)


def test_other_slots_are_left_alone() -> None:
    weights = synthetic_weights(model(2, 2, 17, 34, 40), 0.5)
    states = states_for(weights, 3)
    states[:] = 3.0
    feed(CpuKernels(weights), states, {1: text(9, 40)}, [(1, 0, 9)])
    assert (states[[0, 2]] == 3.0).all()
    assert not (states[1] == 3.0).all()


@pytest.mark.parametrize("position", [0, 1, 12345, 1_000_003, 2**28 + 1])
def test_angles_far_out(position: int) -> None:
    weights = synthetic_weights(model(1, 1, 32, 1024, 40), 0.5)
    kernels = CpuKernels(weights)
    poison(kernels)
    batch = RaggedBatch(text(1, 40), torch.tensor([position]), [0, 1], [0])
    kernels.forward(states_for(weights, 1), batch)
    cos, sin = rotation(weights.frequencies, batch.positions)
    assert np.abs(kernels._work.cos[:512] - cos[0].numpy()).max() <= 6e-8
    assert np.abs(kernels._work.sin[:512] - sin[0].numpy()).max() <= 6e-8


def test_groups_hold_every_segment_once_and_the_largest_come_first() -> None:
    work = np.array([0, 1, 2, 3, 200, 201, 230, 231])
    for groups in (0, 1, 3, 20):
        found = cpu.group(work, groups)
        segments = sorted(segment for first, last in found.tolist() for segment in range(first, last))
        assert segments == list(range(7))
        sizes = [work[last] - work[first] for first, last in found]
        assert sizes == sorted(sizes, reverse=True)


def test_lone_tokens_are_more_work_than_those_of_a_prompt() -> None:
    """Two threads share 63 sequences that decode and a prompt of 64 tokens: who has the prompt gets some of the 63."""
    batch = RaggedBatch(torch.zeros(127, dtype=torch.long), torch.arange(127), [*range(64), 127], list(range(64)))
    (part,) = cpu.rounds(batch, cpu.cut(batch, threads=2, heads=4))
    alone, *shared = [part.bounds[last] - part.bounds[first] for first, last in part.groups]
    assert 40 <= alone <= 50
    assert sum(shared) == 127 - alone


def test_what_was_compiled_is_recompiled_when_any_source_changes() -> None:
    """Numba alone would go on using what it kept."""
    dispatchers: list[Any] = [cpu_step.lead, cpu_state.fold_row]
    for dispatcher in dispatchers:
        assert vector.SOURCES in dispatcher._cache._cache_file._source_stamp
