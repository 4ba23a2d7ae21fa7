from __future__ import annotations

import torch
from hypothesis import given, strategies as st

from bdh_batch.engine.sampling.draw import sample
from bdh_batch.engine.sampling.masks import masked
from bdh_batch.messages import SamplingParams

V = 50
masks = st.lists(st.none() | st.binary(min_size=5, max_size=9), min_size=1, max_size=9)  # of one batch, not one length


def _allows(mask: bytes, token: int) -> bool:
    return token // 8 < len(mask) and bool(mask[token // 8] >> token % 8 & 1)


@given(masks)
def test_a_mask_refuses_what_its_bits_refuse_and_rows_without_one_stay(rows: list[bytes | None]) -> None:
    logits = torch.randn(len(rows), V)
    found = masked(logits, rows)
    for row, mask in enumerate(rows):
        for token in range(V):
            allowed = mask is None or _allows(mask, token)
            assert found[row, token] == (logits[row, token] if allowed else -torch.inf)


@given(
    masks, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([1.0, 0.3]), st.sampled_from([0, 3]), st.integers(0, 99)
)
def test_what_is_refused_is_never_drawn_and_masks_do_not_touch_other_rows(
    rows: list[bytes | None], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    rows = [mask if mask is None or any(_allows(mask, token) for token in range(V)) else None for mask in rows]
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(seed)) * 30
    params = [SamplingParams(temperature, top_p, top_k, seed)] * len(rows)
    drawn = sample(logits, params, range(len(rows)), rows)
    free = sample(logits, params, range(len(rows)))
    for mask, token, unmasked in zip(rows, drawn, free):
        assert token is not None
        assert token == unmasked if mask is None else _allows(mask, token)


def test_without_masks_the_logits_are_not_even_copied() -> None:
    logits = torch.randn(3, V)
    assert masked(logits, []) is logits
    assert masked(logits, [None] * 3) is logits


def test_tokens_beyond_a_mask_are_refused() -> None:
    (row,) = masked(torch.zeros(1, V), [b"\xff" * 4])
    assert (row[:32] == 0).all()
    assert (row[32:] == -torch.inf).all()
