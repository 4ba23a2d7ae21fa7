"""Log-probabilities of tokens, and the likeliest ones beside them: the log-softmax of the model's own logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh_batch.messages import TokenLogprob

ROWS = 128  # of prompts whose logprobs are taken at a time: their logits take memory


class Likeliest(Sequence[tuple[int, float]]):
    """The likeliest tokens of one row with their log-probabilities, likeliest first: a view of the arrays of all rows,
    because as tuples those of a long prompt take ten times the memory.

    Args:
        tokens: [rows, k] int32.
        logprobs: [rows, k] float32.
        top: how many of the k the row has.
    """

    __slots__ = ("_logprobs", "_row", "_tokens", "_top")

    def __init__(self, tokens: NDArray[np.int32], logprobs: NDArray[np.float32], row: int, top: int) -> None:
        self._tokens, self._logprobs, self._row, self._top = tokens, logprobs, row, top

    def __len__(self) -> int:
        return min(self._top, int(self._tokens.shape[1]))

    def __iter__(self) -> Iterator[tuple[int, float]]:
        tokens, logprobs = self._tokens[self._row], self._logprobs[self._row]
        return zip(tokens[: self._top].tolist(), logprobs[: self._top].tolist())

    @overload
    def __getitem__(self, index: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, float]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, float] | list[tuple[int, float]]:
        return list(self)[index]


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], tops: Sequence[int], ranked: bool = False
) -> list[TokenLogprob]:
    """Returns the log-probabilities of one token for each row of `logits` [rows, V] float32.

    Args:
        tokens: one for each row.
        tops: how many of the likeliest tokens each row's entry contains.
        ranked: whether an entry contains its token's rank among all tokens.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, index_of(tokens, logits.device)[:, None])
    own = chosen.squeeze(1).tolist()
    ranks = (logprobs >= chosen).sum(dim=-1).tolist() if ranked else [0] * len(own)
    likeliest, values = _likeliest(logprobs, min(max(tops), logits.shape[-1]))
    return [
        TokenLogprob(token, mine, Likeliest(likeliest, values, row, top), rank)
        for row, (token, mine, top, rank) in enumerate(zip(tokens, own, tops, ranks, strict=True))
    ]


def rows_of(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of those rows."""
    return matrix.index_select(0, index_of(rows, matrix.device))


def index_of(numbers: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64 on `device`; of a list of numbers, numpy makes it several times as fast as torch."""
    found = torch.from_numpy(np.array(numbers, np.int64))
    return found if device.type == "cpu" else found.to(device)


def _likeliest(logprobs: Tensor, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The `count` likeliest tokens of each row, and their log-probabilities."""
    if not count:
        rows = len(logprobs)
        return np.empty((rows, 0), np.int32), np.empty((rows, 0), np.float32)
    found = logprobs.topk(count, dim=-1)
    return found.indices.to(torch.int32).numpy(force=True), found.values.numpy(force=True)
