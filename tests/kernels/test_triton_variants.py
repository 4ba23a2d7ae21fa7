"""The whole family in Triton: every kind of BDH, latent steps, states that are only read, neurons that are shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")

from bdh_batch.kernels import cuda
from bdh_batch.kernels.base import Kernels, RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import ALL_AT_ONCE, UPSTREAM, VARIANTS, alone, distance, model, states_for, variant
from tests.kernels.test_triton import DEVICE, TOLERANCE, TOLERANCE_OF, Poisoned, states_on_device, text

pytestmark = pytest.mark.no_cover  # tracing would more than double what the interpreter takes

VOCABULARY = 40
WINDOW = 6
KINDS = [kind for kind in VARIANTS if kind not in (UPSTREAM, "base 10,000")]  # a base is a table of frequencies


def weights_of(kind: str, dtype: torch.dtype = torch.float32) -> Weights:
    """A width of 17: a layer's matrices do not begin at a multiple of 16 bytes."""
    return variant(synthetic_weights(model(2, 1, 17, 34, VOCABULARY), 0.3, dtype=dtype), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_agrees_with_the_specification(kind: str) -> None:
    """A prompt in pieces, then tokens one by one."""
    weights = weights_of(kind)
    mine, right = states_on_device(weights, 1), states_for(weights, 1)
    got = alone(Poisoned(weights), mine, text(20, VOCABULARY), 0, [17, 18, 19])
    expected = alone(TorchKernels(weights), right, text(20, VOCABULARY), 0, [])
    assert distance(got, expected) <= TOLERANCE
    assert distance(mine.cpu(), right) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_and_a_window_with_all_kinds_at_once(dtype: torch.dtype) -> None:
    weights = weights_of(ALL_AT_ONCE, dtype=dtype)
    mine, right = states_on_device(weights, 1, WINDOW), states_for(weights, 1, WINDOW)
    got = alone(Poisoned(weights, WINDOW), mine, text(14, VOCABULARY), 0, [10, 11, 12])
    expected = alone(TorchKernels(weights, WINDOW), right, text(14, VOCABULARY), 0, [10, 11, 12])
    assert distance(got, expected) <= max(TOLERANCE_OF[dtype], TOLERANCE if DEVICE.type == "cuda" else 0)


def reason(kernels: Kernels, states: Tensor, steps: dict[int, int], frozen: Sequence[int], beside: int) -> Tensor:
    """The final hidden vectors of the last steps of prompts in some slots that go on for a number of latent steps.

    Those of the slots in `frozen` only read their states. In slot 0 a text enters beside them, `beside` tokens a step.
    """
    other = text(99, VOCABULARY, 9)
    hidden: dict[int, Tensor] = {}
    for slot in steps:
        row = text(2 + slot, VOCABULARY, slot)
        batch = RaggedBatch(row, torch.arange(len(row)), [0, len(row)], [slot])
        hidden[slot] = kernels.forward(states, batch)[-1]
    for i in range(max(steps.values())):
        going = [slot for slot in steps if i < steps[slot]]
        begin = i * beside
        batch = RaggedBatch(
            tokens=torch.cat([torch.tensor([-1 - k for k in range(len(going))]), other[begin : begin + beside]]),
            positions=torch.tensor([2 + slot + i for slot in going] + [*range(begin, begin + beside)]),
            bounds=[*range(len(going) + 1), len(going) + beside],
            slots=[*going, 0],
            vectors=torch.stack([hidden[slot] + 0.25 for slot in going]),
            frozen=[*(slot in frozen for slot in going), False] if frozen else [],
        )
        hidden |= dict(zip(going, kernels.forward(states, batch)))
    return torch.stack(list(hidden.values()))


STEPS, FROZEN = {3: 2, 1: 3, 2: 1}, (1, 2)


@pytest.mark.parametrize(
    ("window", "beside"),
    [(0, 1), (WINDOW, 1), (WINDOW, 2)],
    ids=["decode", "decode in a window", "beside a prompt"],
)
def test_latent_steps_agree_with_the_specification(window: int, beside: int) -> None:
    weights = weights_of(ALL_AT_ONCE)
    mine, right = states_on_device(weights, 4, window), states_for(weights, 4, window)
    got = reason(Poisoned(weights, window, latent=True), mine, STEPS, FROZEN, beside)
    expected = reason(TorchKernels(weights, window), right, STEPS, FROZEN, beside)
    assert distance(got.cpu(), expected) <= TOLERANCE
    assert distance(mine.cpu(), right) <= TOLERANCE


def test_latent_steps_have_the_same_bits_in_any_company() -> None:
    weights = weights_of(UPSTREAM)
    kernels, crowd, beside = Poisoned(weights, latent=True), states_on_device(weights, 4), states_on_device(weights, 4)
    together = reason(kernels, crowd, STEPS, FROZEN, 1)
    assert torch.equal(reason(kernels, beside, STEPS, FROZEN, 2), together)
    assert torch.equal(beside[1:], crowd[1:])
    single = states_on_device(weights, 4)
    assert torch.equal(reason(kernels, single, {3: STEPS[3]}, FROZEN, 1)[0], together[0])
    assert torch.equal(single[3], crowd[3])


@pytest.mark.parametrize(("window", "dtype"), [(0, torch.float32), (WINDOW, torch.bfloat16)])
def test_a_frozen_token_reads_as_any_other_and_writes_nothing(window: int, dtype: torch.dtype) -> None:
    """At a block's first position too, where the oldest block leaves all the same."""
    weights = weights_of(UPSTREAM)
    kernels, states = Poisoned(weights, window, latent=True), states_on_device(weights, 1, window).to(dtype)
    row = text(6, VOCABULARY)
    kernels.forward(states, RaggedBatch(row[:5], torch.arange(5), [0, 5], [0]))
    for position in (5, 6):
        before, written = states.clone(), states.clone()
        one = RaggedBatch(row[5:], torch.tensor([position]), [0, 1], [0], [False])
        expected = kernels.forward(written, replace(one, draws=[True]))
        assert torch.equal(kernels.forward(states, replace(one, frozen=[True])), expected)
        assert not torch.equal(written, states)
        if position % (WINDOW // 2) or not window:
            assert torch.equal(states, before)
        else:
            both, earlier = states.unbind(2)
            assert torch.equal(both, earlier)
            left = before[:, :, 0].float() - before[:, :, 1].float()
            torch.testing.assert_close(both.float(), left, rtol=torch.finfo(dtype).eps, atol=0)


def test_segments_begin_in_the_states_of_their_sources() -> None:
    weights = weights_of(UPSTREAM)
    kernels, states = Poisoned(weights), states_on_device(weights, 4)
    kernels.forward(states, RaggedBatch(text(5, VOCABULARY), torch.arange(5), [0, 5], [2]))
    copied = states.clone()
    copied[:2] = states[2]
    batch = RaggedBatch(text(4, VOCABULARY), torch.tensor([5, 5, 6, 0]), [0, 1, 3, 4], [0, 1, 3])
    expected = kernels.forward(copied, batch)
    assert torch.equal(kernels.forward(states, replace(batch, sources=[2, 2, 3])), expected)
    assert torch.equal(states, copied)


def test_only_single_tokens_are_frozen() -> None:
    batch = RaggedBatch(text(3, VOCABULARY), torch.arange(3), [0, 1, 3], [1, 0], frozen=[False, True])
    with pytest.raises(ValueError, match="only read has one token"):
        cuda.marked(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_watched_tokens_fire_is_shown_and_changes_nothing(dtype: torch.dtype) -> None:
    """Of decode steps, of prompts, and of a batch of several rounds, in one of which nothing is watched."""
    weights = weights_of(ALL_AT_ONCE, dtype=dtype)
    kernels = Poisoned(weights, max_tokens=8)
    for lengths, watched in (([1, 1], [1]), ([1, 5, 1], [0, 2, 4, 6]), ([20], [0, 7, 17]), ([3], [])):
        bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        positions = torch.cat([torch.arange(length) for length in lengths])
        batch = RaggedBatch(text(bounds[-1], VOCABULARY), positions, bounds, range(len(lengths)), watched=watched)
        shown = torch.full((2, len(watched), 1, 34), torch.nan, device=DEVICE)
        expected = torch.full((2, len(watched), 1, 34), torch.nan)
        hidden = kernels.forward(states_on_device(weights, 3), batch, None, shown)
        assert torch.equal(hidden, kernels.forward(states_on_device(weights, 3), batch))
        TorchKernels(weights).forward(states_for(weights, 3), batch, None, expected)
        torch.testing.assert_close(shown.cpu(), expected, atol=3 * TOLERANCE_OF[dtype], rtol=TOLERANCE_OF[dtype])
        assert not watched or 0.1 < (shown > 0).float().mean() < 0.6
