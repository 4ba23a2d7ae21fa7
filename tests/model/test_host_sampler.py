"""Draws by compiled passes give the tokens that the specification, torch's operators, gives: whatever is asked for."""

from __future__ import annotations

import math
import random
import sys

import pytest
import torch
from torch import Tensor

from bdh_batch.engine.sampling.draw import sample
from bdh_batch.engine.sampling.host_sampler import ELEMENTS, HostSampler
from bdh_batch.messages import LogitBias, SamplingParams

VOCABULARIES = (2, 23, 256, 1000)


def some_params(chance: random.Random, vocabulary: int) -> SamplingParams:
    return SamplingParams(
        temperature=chance.choice([0.0, 0.3, 0.7, 1.0, 2.0, 100.0, 1e-5, 1e-40, 1e300]),
        top_p=chance.choice([1e-9, 0.1, 0.5, 0.9, 0.99999, 1 - 1e-12, 1.0, 1.0]),
        top_k=chance.choice([0, 0, 1, 2, 10, vocabulary - 1, vocabulary, 2**70]),
        min_p=chance.choice([0.0, 0.0, 1e-9, 0.031, 1.0, chance.random()]),
        seed=chance.randrange(2**64),
    )


def some_logits(chance: random.Random, rows: int, vocabulary: int) -> Tensor:
    """Some with ties, rows that lie apart, and numbers that are none."""
    found = torch.randn(rows, vocabulary) * chance.choice([0.01, 1.0, 3.0, 30.0])
    if chance.random() < 0.4:
        found = (found * 2).round() / 2
    if chance.random() < 0.3:
        bad = [math.nan, -math.nan, math.inf, -math.inf, -1e30, -0.0]
        found[chance.randrange(rows), chance.randrange(vocabulary)] = chance.choice(bad)
    return torch.nn.functional.pad(found, (0, 13))[:, :vocabulary] if chance.random() < 0.3 else found


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokens_are_those_of_the_specification(vocabulary: int) -> None:
    chance, drawn = random.Random(vocabulary), HostSampler()
    torch.manual_seed(vocabulary)
    for _ in range(60):
        rows = chance.randint(1, 24)
        logits = some_logits(chance, rows, vocabulary)
        params = [some_params(chance, vocabulary) for _ in range(rows)]
        positions = [chance.choice([chance.randrange(1000), chance.randrange(2**40)]) for _ in range(rows)]
        few = [None, b"", *(chance.randbytes(chance.randint(0, vocabulary // 8 + 2)) for _ in range(3))]
        masks = [chance.choice(few) for _ in range(rows)] if chance.random() < 0.5 else []
        untouched = logits.clone()
        assert drawn(logits, params, positions, masks) == sample(logits, params, positions, masks)
        assert torch.equal(logits.view(torch.int32), untouched.view(torch.int32)), "they are only read"


def test_many_rows_go_through_the_same_small_buffers() -> None:
    """More rows than are drawn at a time, of one vocabulary after another, and rows that are one in memory."""
    drawn = HostSampler()
    for vocabulary, rows in ((4096, 2 * ELEMENTS // 4096 + 3), (64, 5), (ELEMENTS + 1, 2)):
        logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(rows)).expand(rows, -1)
        params = [SamplingParams(seed=row, top_p=0.9 if row % 3 else 1.0) for row in range(rows)]
        masks = [None if row % 2 else b"\x0f" * (vocabulary // 8) for row in range(rows)]
        assert drawn(logits, params, range(rows), masks) == sample(logits, params, range(rows), masks)
    assert drawn._scaled_rows.numel() == 2**18 + 1, "a row at least, and else no more than ELEMENTS"


def test_the_numbers_of_parameters_are_kept_and_not_the_parameters() -> None:
    drawn, bias, logits = HostSampler(), LogitBias.of({3: 1.0}), torch.randn(1, 23)
    params = SamplingParams(seed=7, top_p=0.9, logit_bias=bias)
    held = sys.getrefcount(bias)
    assert drawn(logits, [params], [3]) == sample(logits, [params], [3])
    del params
    assert sys.getrefcount(bias) == held - 1, "it goes with its request"
