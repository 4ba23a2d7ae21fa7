from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, strategies as st

from bdh_batch.engine.sampling.draw import Words, philox, sample, uniforms, words
from bdh_batch.messages import SamplingParams

LOGITS = torch.randn(64, 50, generator=torch.Generator().manual_seed(3)) * 2

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 10, 49, 50, 1000]),
    seed=st.integers(0, 2**64 - 1),
)


def test_philox_gives_the_published_numbers() -> None:
    """The known-answer vectors of Random123, philox4x32 with 10 rounds."""

    def single(*values: int) -> list[Words]:
        return [np.array([value], np.uint64) for value in values]

    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert tuple(word.item() for word in philox(single(*counter), single(*key))) == expected


def test_uniforms_have_all_their_bits() -> None:
    seeds, positions = [2**64 - 1, 5, 1 << 40], [0, 2**33 + 1, 7]
    (seed_low, seed_high), (low, high) = words(seeds), words(positions)
    first, second, *_ = philox([low, high, low & np.uint64(0), low & np.uint64(0)], [seed_low, seed_high])
    exact = [((a >> 5 << 26) + (b >> 6)) / 2**53 for a, b in zip(first.tolist(), second.tolist())]
    assert uniforms(seeds, positions).tolist() == exact


def test_uniforms_are_spread_evenly() -> None:
    found = torch.from_numpy(uniforms([5] * 100_000, range(100_000)))
    assert found.min() >= 0
    assert found.max() < 1
    counts = torch.histc(found, bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 180  # chi-squared, 99 degrees of freedom


@given(st.lists(params, min_size=1, max_size=20), st.data())
def test_a_row_is_drawn_alike_alone_and_in_any_company(rows: list[SamplingParams], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    positions = [17 * row for row in range(len(rows))]
    together = sample(LOGITS[order], [rows[row] for row in order], [positions[row] for row in order])
    for row, token in zip(order, together):
        assert sample(LOGITS[row : row + 1], [rows[row]], [positions[row]]) == [token]


@given(st.lists(params, min_size=1, max_size=20))
def test_filters_keep_the_likeliest(rows: list[SamplingParams]) -> None:
    tokens = sample(LOGITS[: len(rows)], rows, range(len(rows)))
    for logits, row, token in zip(LOGITS, rows, tokens):
        assert token is not None
        order = logits.argsort(descending=True)
        rank = int((order == token).nonzero())
        if row.temperature == 0:
            assert rank == 0
            continue
        assert row.top_k == 0 or rank < row.top_k
        kept = order[: row.top_k or None]
        probabilities = (logits[kept] / row.temperature).softmax(dim=-1)
        assert rank == 0 or probabilities[:rank].sum() < row.top_p + 1e-5


def test_draws_follow_the_softmax() -> None:
    logits = LOGITS[:1].expand(20_000, -1)
    tokens = sample(logits, [SamplingParams(seed=9)] * 20_000, range(20_000))
    counts = torch.bincount(torch.tensor(tokens), minlength=50)
    expected = LOGITS[0].softmax(dim=-1) * 20_000
    assert ((counts - expected) ** 2 / expected.clamp(min=1)).sum() < 110  # 49 degrees of freedom


def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others_alone() -> None:
    logits = LOGITS[:3].clone()
    logits[1, 4] = torch.nan
    hot = [SamplingParams(seed=1)] * 3
    found = sample(logits, hot, [1, 2, 3])
    clean = sample(LOGITS[:3], hot, [1, 2, 3])
    assert found == [clean[0], None, clean[2]]
