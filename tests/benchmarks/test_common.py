"""What the benchmarks share: fair turns, honest intervals, baselines that compute what they claim to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.common import medians, ratio, take_turns
from benchmarks.engine.dense import dense_batched, recompute, relative_error
from benchmarks.engine.synthetic import synthetic_weights
from benchmarks.plots import bars, lines
from tests.kernels.support import distance, model, states_for


def test_variants_take_turns_and_are_warm_before_they_are_timed() -> None:
    ran: list[str] = []
    timed: list[str] = []

    def clock(variant: Callable[[], object]) -> float:
        variant()
        timed.append(ran[-1])
        return float(len(timed))

    rounds: list[None] = []
    times = take_turns(
        {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, clock, lambda: rounds.append(None)
    )
    assert timed == ["a", "b"] * 3
    assert ran == ["a", "a", "b", "b", *timed]
    assert len(rounds) == 3
    assert times == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    assert medians(times) == {"a": 3.0, "b": 4.0}


def test_a_ratio_of_rounds_that_are_slow_together_is_sure() -> None:
    """The machine's mood, common to both variants of a round, does not widen the interval as it would unpaired."""
    moods = [1.0 + i % 5 for i in range(100)]
    found = ratio([1.02 * mood for mood in moods], moods)
    assert found.value == pytest.approx(1.02)
    assert 1.0 < found.low <= found.value <= found.high < 1.05


def test_a_ratio_of_noise_says_that_it_is_unsure() -> None:
    noise = torch.rand(2, 15, generator=torch.Generator().manual_seed(0)) + 0.5
    found = ratio(noise[0].tolist(), noise[1].tolist())
    assert found.low < found.value < found.high
    assert found.high - found.low > 0.1


def test_an_error_that_is_not_a_number_is_none_that_is_allowed() -> None:
    right = torch.ones(3)
    assert relative_error([right * 1.5, right], [right, right]) == pytest.approx(0.5)
    assert not relative_error([right * torch.nan, right], [right, right]) <= 1.0
    assert not relative_error([right, right * torch.nan], [right, right]) <= 1.0


def test_the_baselines_compute_the_same() -> None:
    weights = synthetic_weights(model(2, 2, 16, 32, 20), 0.3)
    tokens = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    kernels, states = TorchKernels(weights), states_for(weights, 3)
    for t in range(7):
        batch = RaggedBatch(tokens[:, t], torch.full((3,), t), range(4), range(3))
        before = states.clone()
        logits = kernels.logits(kernels.forward(states, batch))
        assert distance(dense_batched(weights, before, batch), logits) <= 1e-6
        assert torch.equal(before, states) or distance(before, states) <= 1e-6
    for together in (1, 2, 4):
        assert distance(recompute(weights, tokens, together), logits) <= 1e-5


def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines(tmp_path / f"lines-{name}.svg", "title", "x", "y", {"one": ([1, 2, 4], [3.0, 2.0, 1.0])})
        bars(tmp_path / f"bars-{name}.svg", "title", "x", {"one": 3.0}, {"one": "a note"}, log=True)
    for kind in ("lines", "bars"):
        first, second = ((tmp_path / f"{kind}-{name}.svg").read_bytes() for name in ("a", "b"))
        assert b"<svg" in first
        assert first == second
