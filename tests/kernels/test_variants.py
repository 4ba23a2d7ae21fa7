"""The whole family on the CPU: every kind of BDH, latent steps, states that are only read, neurons that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bdh_batch.kernels.base import Kernels, RaggedBatch, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.cpu_layout import MAX_TOKENS
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import (
    ALL_AT_ONCE,
    UPSTREAM,
    VARIANTS,
    alone,
    distance,
    in_a_crowd,
    model,
    poison,
    states_for,
    variant,
)

TOLERANCE = 1e-5
LENGTH, VOCABULARY = 60, 40
kinds = pytest.mark.parametrize("kind", [UPSTREAM, ALL_AT_ONCE])
windows = pytest.mark.parametrize("window", [0, 6])


def weights_of(kind: str, layers: int = 3, heads: int = 2, width: int = 34, neurons: int = 68) -> Weights:
    return variant(synthetic_weights(model(layers, heads, width, neurons, VOCABULARY), 0.3), kind)


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def step(kernels: Kernels, states: Tensor, batch: RaggedBatch, shown: Tensor | None = None) -> Tensor:
    poison(kernels)
    return kernels.forward(states, batch, None, shown)


def test_each_kind_is_another_model() -> None:
    """Else a kind that the kernels overlook would pass."""
    logits = [alone(TorchKernels(w), states_for(w, 1), text(LENGTH), 0, []) for w in map(weights_of, VARIANTS)]
    for i, one in enumerate(logits):
        assert all(distance(one, other) > 100 * TOLERANCE for other in logits[:i])


@pytest.mark.parametrize("kind", VARIANTS)
class TestEachKindAgreesWithTheSpecification:
    @windows
    @pytest.mark.parametrize("cuts", [[], range(1, LENGTH)], ids=["whole", "by token"])
    def test_alone(self, kind: str, window: int, cuts: Sequence[int]) -> None:
        weights = weights_of(kind)
        mine, right = states_for(weights, 1, window), states_for(weights, 1, window)
        got = alone(CpuKernels(weights, window), mine, text(LENGTH), 0, cuts)
        expected = alone(TorchKernels(weights, window), right, text(LENGTH), 0, [])
        assert distance(got, expected) <= TOLERANCE
        assert distance(mine, right) <= TOLERANCE

    def test_in_ragged_pieces_among_others(self, kind: str) -> None:
        weights = weights_of(kind)
        sequences = {3: text(LENGTH), 0: text(25, 1), 1: text(47, 2)}
        logits = in_a_crowd(CpuKernels(weights), states_for(weights, 4), sequences, np.random.default_rng(0), 20)
        for slot, row in sequences.items():
            expected = alone(TorchKernels(weights), states_for(weights, 4), row, slot, [])
            assert distance(logits[slot], expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_of_all_kinds_at_once(dtype: torch.dtype) -> None:
    weights = variant(synthetic_weights(model(3, 2, 48, 96, VOCABULARY), 0.3, dtype=dtype), ALL_AT_ONCE)
    got = alone(CpuKernels(weights), states_for(weights, 1), text(LENGTH), 0, [50, 51])
    expected = alone(TorchKernels(weights), states_for(weights, 1), text(LENGTH), 0, [50, 51])
    assert distance(got, expected) <= (3e-2 if dtype == torch.bfloat16 else 4e-3)


def reason(kernels: Kernels, weights: Weights, states: Tensor, steps: dict[int, int], frozen: Sequence[int]) -> Tensor:
    """The final hidden vectors of the last steps of prompts in some slots that go on for a number of latent steps.

    Those of the slots in `frozen` only read their states. Between them decodes the sequence in slot 0.
    """
    others = text(99, 9)
    prompts = {slot: text(7 + slot, slot) for slot in steps}
    hidden = {
        slot: step(kernels, states, RaggedBatch(row, torch.arange(len(row)), [0, len(row)], [slot]))[-1]
        for slot, row in prompts.items()
    }
    for i in range(max(steps.values())):
        going = [slot for slot in steps if i < steps[slot]]
        assert weights.latent_embed is not None
        batch = RaggedBatch(
            tokens=torch.tensor([-1 - k for k in range(len(going))] + [int(others[i])]),
            positions=torch.tensor([len(prompts[slot]) + i for slot in going] + [i]),
            bounds=range(len(going) + 2),
            slots=[*going, 0],
            vectors=torch.stack([hidden[slot] for slot in going]) + weights.latent_embed,
            frozen=[*(slot in frozen for slot in going), False],
        )
        hidden |= dict(zip(going, step(kernels, states, batch)))
    return torch.stack(list(hidden.values()))


def latent(weights: Weights) -> Weights:
    width = weights.embed.shape[1]
    return replace(weights, latent_embed=torch.randn(width, generator=torch.Generator().manual_seed(3)))


@kinds
@windows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestLatentSteps:
    STEPS, FROZEN = {3: 5, 1: 16, 4: 1, 2: 9}, (1, 4)

    def test_agree_with_the_specification(self, kind: str, window: int, dtype: torch.dtype) -> None:
        weights = latent(weights_of(kind))
        mine, right = (states_for(weights, 5, window, dtype) for _ in range(2))
        got = reason(CpuKernels(weights, window), weights, mine, self.STEPS, self.FROZEN)
        expected = reason(TorchKernels(weights, window), weights, right, self.STEPS, self.FROZEN)
        tolerance = TOLERANCE if dtype == torch.float32 else 6e-2
        assert distance(got, expected) <= tolerance
        assert distance(mine, right) <= tolerance

    def test_have_the_same_bits_in_any_company(self, kind: str, window: int, dtype: torch.dtype) -> None:
        weights = latent(weights_of(kind))
        kernels, crowd = CpuKernels(weights, window), states_for(weights, 5, window, dtype)
        together = reason(kernels, weights, crowd, self.STEPS, self.FROZEN)
        for (slot, steps), hidden in zip(self.STEPS.items(), together):
            single = states_for(weights, 5, window, dtype)
            assert torch.equal(reason(kernels, weights, single, {slot: steps}, self.FROZEN)[0], hidden)
            assert torch.equal(single[slot], crowd[slot])

    def test_a_frozen_one_reads_as_any_other_and_writes_nothing(
        self, kind: str, window: int, dtype: torch.dtype
    ) -> None:
        """At a block's first position too, where the oldest block leaves all the same."""
        weights = weights_of(kind)
        kernels, states = CpuKernels(weights, window), states_for(weights, 1, window, dtype)
        row = text(12)
        step(kernels, states, RaggedBatch(row[:11], torch.arange(11), [0, 11], [0]))
        for position in (11, 12):
            before, written = states.clone(), states.clone()
            one = RaggedBatch(row[11:], torch.tensor([position]), [0, 1], [0])
            expected = step(kernels, written, one)
            assert torch.equal(step(kernels, states, replace(one, frozen=[True])), expected)
            assert not torch.equal(written, states)
            if position % 3 or not window:
                assert torch.equal(states, before)
            else:
                both, earlier = states.unbind(2)
                left = before[:, :, 0].float() - before[:, :, 1].float()
                assert torch.equal(both, earlier)
                torch.testing.assert_close(both.float(), left, rtol=torch.finfo(dtype).eps / 2, atol=0)


def test_a_latent_step_without_its_vector_is_no_number_and_stays_alone() -> None:
    weights = weights_of(ALL_AT_ONCE)
    kernels = CpuKernels(weights)
    for vectors in (None, torch.zeros(1, 34)):
        batch = RaggedBatch(torch.tensor([5, -2]), torch.tensor([0, 0]), [0, 1, 2], [0, 1], vectors=vectors)
        healthy, broken = step(kernels, states_for(weights, 2), batch)
        assert broken.isnan().all()
        assert torch.equal(healthy[None], step(kernels, states_for(weights, 1), RaggedBatch(*one_token(5))))


def one_token(token: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    return torch.tensor([token]), torch.tensor([0]), [0, 1], [0]


@pytest.mark.parametrize("kind", [UPSTREAM, "matrices by layer", ALL_AT_ONCE])
@pytest.mark.parametrize("neurons", [34, 64, 68, 102])
def test_what_watched_tokens_fire_is_shown_in_the_checkpoints_order(kind: str, neurons: int) -> None:
    """Over two rounds, of one thread's groups and of many; asking changes no result, and nothing else is written."""
    weights = weights_of(kind, heads=2, width=17 if neurons % 64 else 16, neurons=neurons)
    for lengths in ([1, 40, 3, MAX_TOKENS, 1, 1, 20], [MAX_TOKENS + 9], [1]):
        bounds = [0, *np.cumsum(lengths).tolist()]
        batch = RaggedBatch(
            tokens=text(bounds[-1]),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            bounds=bounds,
            slots=range(len(lengths)),
            watched=sorted({0, bounds[-1] // 2, *range(max(0, bounds[-1] - 40), bounds[-1], 3), bounds[-1] - 1}),
        )
        mine, right, unasked = (states_for(weights, len(lengths)) for _ in range(3))
        kernels = CpuKernels(weights)
        shown, expected = torch.full((2, 3, len(batch.watched), 2, neurons), torch.nan)
        hidden = step(kernels, mine, batch, shown)
        TorchKernels(weights).forward(right, batch, None, expected)
        assert distance(shown, expected) <= TOLERANCE
        assert 0.1 < (shown > 0).float().mean() < 0.6
        assert torch.equal(step(kernels, unasked, batch), hidden)
        assert torch.equal(unasked, mine)


def test_nobody_is_watched_where_none_is_named() -> None:
    weights = weights_of(UPSTREAM)
    batch = RaggedBatch(text(5), torch.arange(5), [0, 5], [0])
    step(CpuKernels(weights), states_for(weights, 1), batch, torch.empty(3, 0, 2, 68))
