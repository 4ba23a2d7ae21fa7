"""The runner with kernels that draw as they go, against the same kernels without: each step has the same outcome."""

from __future__ import annotations

import random
import sys
from array import array
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")

from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import Kernels, RaggedBatch
from bdh_batch.kernels.cuda import TritonKernels
from bdh_batch.messages import (
    LATENT,
    LATENT_FROZEN,
    LogitBias,
    LogitsProcessors,
    Outcome,
    Plan,
    SamplingParams,
    Segment,
)
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import model
from tests.kernels.test_triton import DEVICE, SMALL, on_device

pytestmark = pytest.mark.no_cover  # tracing would more than double what the interpreter takes

VOCABULARY = 20


class Evens:
    """A constraint: even tokens alone."""

    complete = False

    def mask(self) -> bytes:
        return b"\x55" * 3

    def accept(self, token: int) -> bool:
        return True


class StepByStep:
    """Kernels that are asked for each part of a step."""

    def __init__(self, kernels: TritonKernels) -> None:
        self.kernels = kernels

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        return self.kernels.forward(states, batch, active, fired)

    def warm(self, states: Tensor) -> None:
        self.kernels.warm(states)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.kernels.logits(hidden)


def plain(outcome: Outcome) -> object:
    logprobs = {
        row: (each.token, each.logprob, list(each.top), each.rank) for row, each in sorted(outcome.logprobs.items())
    }
    return list(outcome.drawn), logprobs, list(outcome.active)


def test_outcomes_are_the_same_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and hot rows, all filters, log-probabilities, penalties and bias, constraints, and latent steps, of which
    some only read their state: beside each other, and each by itself. In one step of many, neurons are counted."""
    config = replace(model(1, 1, 16, 32, VOCABULARY), latent_steps=True)
    weights, latent_embed = on_device(synthetic_weights(config, 0.3)), torch.full((16,), 0.1, device=DEVICE)
    kernels, slots = TritonKernels(weights, 0, SMALL, max_tokens=8, latent=True), 6
    pools = [StatePool(config, slots, DEVICE) for _ in range(2)]
    both: list[Kernels] = [kernels, StepByStep(kernels)]
    runners = [Runner(each, pool, latent_embed) for each, pool in zip(both, pools, strict=True)]
    decode = Mock(wraps=kernels.decode)
    monkeypatch.setattr(kernels, "decode", decode)
    chance = random.Random(3)
    at = [0] * slots
    for step in range(12):
        chosen = chance.sample(range(slots), 1 + step % slots)
        segments = [segment(chance, slot, at[slot]) for slot in chosen]
        for slot in chosen:
            at[slot] += 1
        mine, right = (plain(runner.run(Plan(segments))) for runner in runners)
        assert mine == right
        assert torch.equal(pools[0].states[chosen], pools[1].states[chosen])
    assert decode.call_count == 11, "all but the one in which neurons are counted"


def segment(chance: random.Random, slot: int, start: int) -> Segment:
    """One token, or a latent step, of a sequence."""
    sampling = SamplingParams(
        temperature=chance.choice([0.0, 0.7, 1.3]),
        top_k=chance.choice([0, 0, 3]),
        top_p=chance.choice([1.0, 0.8]),
        min_p=chance.choice([0.0, 0.1]),
        seed=chance.randrange(2**64),
        repetition_penalty=chance.choice([1.0, 1.5]),
        logit_bias=chance.choice([None, None, LogitBias.of({3: 2.0})]),
        logprobs=chance.choice([None, None, 2]),
    )
    processors = LogitsProcessors.of(sampling, [1, 2, 5], array("q"), 0)
    constraint = chance.choice([None, None, Evens()])
    kind = chance.choice([LATENT, LATENT_FROZEN, None, None, None]) if start else None
    if kind == LATENT_FROZEN:
        return Segment(slot, start, [kind], None)
    token = chance.randrange(VOCABULARY) if kind is None else kind
    return Segment(slot, start, [token], sampling, processors, constraint)
