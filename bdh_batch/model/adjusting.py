"""Changes scores as requests wish before tokens are drawn: bias, penalties, bans.

Only the entries that change are touched, those of all rows together; a row without wishes costs nothing. The order and
the formulas are vLLM's: bias; then, on the tokens that came, the repetition penalty (prompt and answer), the frequency
and the presence penalty (answer); then bans.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bdh_batch.messages import Adjustment

BANNED = -1e30  # what a banned token scores: below all that a bias or a penalty can do, and still finite
_FARTHEST = 1e29  # from 0, that penalties can move a score

Wishes = Sequence[tuple[int, Adjustment]]  # with the rows that are theirs


def adjust(logits: Tensor, wishes: Wishes) -> None:
    """Changes rows of `logits` [rows, V] float32, in place."""
    if biased := [(row, wish) for row, wish in wishes if wish.sampling.logit_bias]:
        _add_bias(logits, biased)
    if penalised := [(row, wish) for row, wish in wishes if wish.seen]:
        _penalise(logits, penalised)
    if banned := [(row, bans) for row, wish in wishes if (bans := wish.bans)]:
        where = _entries(logits, [(row, array("q", bans)) for row, bans in banned])
        logits[where] = BANNED


def _add_bias(logits: Tensor, biased: Wishes) -> None:
    pairs = [(row, wish.sampling.logit_bias) for row, wish in biased]
    where = _entries(logits, [(row, array("q", [token for token, _ in bias])) for row, bias in pairs])
    logits[where] += _on(logits, array("f", [amount for _, bias in pairs for _, amount in bias]), torch.float32)


def _penalise(logits: Tensor, penalised: Wishes) -> None:
    where = _entries(logits, [(row, wish.seen) for row, wish in penalised])
    times = _on(logits, _joined(wish.times for _, wish in penalised), torch.int64)
    each = [wish.sampling for _, wish in penalised]
    of_row = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in each]
    # In float64, as a repetition penalty may be any number above 0.
    numbers = torch.tensor(of_row, dtype=torch.float64, device=logits.device)
    lengths = torch.tensor([len(wish.seen) for _, wish in penalised], device=logits.device)
    repetition, frequency, presence = numbers.repeat_interleave(lengths, dim=0).unbind(dim=1)
    scores = logits[where].double()
    changed = torch.where(scores > 0, scores / repetition, scores * repetition)
    changed -= frequency * times + presence * (times > 0)
    logits[where] = changed.clamp(-_FARTHEST, _FARTHEST).float()


def _entries(logits: Tensor, tokens_of_rows: Sequence[tuple[int, array[int]]]) -> tuple[Tensor, Tensor]:
    """Where those tokens of those rows lie in `logits`; no place twice."""
    rows = torch.tensor([row for row, _ in tokens_of_rows])
    lengths = torch.tensor([len(tokens) for _, tokens in tokens_of_rows])
    tokens = _on(logits, _joined(tokens for _, tokens in tokens_of_rows), torch.int64)
    return rows.repeat_interleave(lengths).to(logits.device), tokens


def _joined(arrays: Iterable[array[int]]) -> bytearray:
    return bytearray().join(arrays)


def _on(logits: Tensor, numbers: bytearray | array[float], dtype: torch.dtype) -> Tensor:
    """Numbers as they lie in memory, as a tensor beside `logits`."""
    return torch.frombuffer(numbers, dtype=dtype).to(logits.device)
