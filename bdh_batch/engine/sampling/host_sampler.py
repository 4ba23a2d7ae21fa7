"""Draws tokens from logits in main memory: compiled passes, the softmax between two of them, and their buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdh_batch.engine.sampling import passes
from bdh_batch.engine.sampling.parameters import packed
from bdh_batch.kernels.drawing import WORDS
from bdh_batch.messages import SamplingParams

ELEMENTS = 2**18  # numbers of the rows that are drawn at a time, at least one: a megabyte, and the buffers stay small


class PackedParameters(NamedTuple):
    """The records of rows' parameters, as `passes` reads them."""

    numbers: passes.Floats  # [rows * NUMBERS]
    words: passes.Longs  # the same as [rows * WORDS]

    def of(self, begin: int, end: int) -> PackedParameters:
        """Those of the rows from `begin` to `end`."""
        return PackedParameters(
            self.numbers[begin * passes.NUMBERS : end * passes.NUMBERS], self.words[begin * WORDS : end * WORDS]
        )


class HostSampler:
    """Draws one token for each row of logits, with the same bits as `draw.sample`.

    It belongs to one thread, and its buffers to one size of vocabulary at a time.
    """

    def __init__(self) -> None:
        self._vocabulary = self._rows = 0

    def __call__(
        self,
        logits: Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        masks: Sequence[bytes | None] = (),
    ) -> list[int | None]:
        """Draws as `draw.sample` does; `logits` [rows, V] float32 lie in main memory."""
        return self.draw(logits, pack(params), np.array(positions, np.int64), masks)

    def draw(
        self, logits: Tensor, by: PackedParameters, positions: passes.Longs, masks: Sequence[bytes | None] = ()
    ) -> list[int | None]:
        """Draws by parameters that `pack` has packed; `positions` are [rows]."""
        rows, vocabulary = logits.shape
        most = max(1, ELEMENTS // vocabulary)
        self._allocate(min(rows, most), vocabulary)
        if rows <= most:
            return self._sample(logits, by, positions, masks)
        tokens: list[int | None] = []
        for begin in range(0, rows, most):
            part = slice(begin, begin + most)
            tokens += self._sample(logits[part], by.of(begin, begin + most), positions[part], masks[part])
        return tokens

    def _sample(
        self, logits: Tensor, by: PackedParameters, positions: passes.Longs, masks: Sequence[bytes | None]
    ) -> list[int | None]:
        rows, vocabulary = logits.shape
        flat, pitch = _flat(logits)
        numbers, words = by
        tokens, hot = self._tokens[:rows], self._hot
        packed_masks, mask_of, mask_size = self._masks(masks, vocabulary)
        count, filtered = passes.scale(
            flat, flat.view(np.int32), pitch, vocabulary, numbers, words, packed_masks, mask_of, mask_size, tokens, hot,
            self._scaled,
        )  # fmt: skip
        if count:
            if filtered:
                self._filter(numbers, words, count, filtered)
            self._softmax(self._scaled_rows, count)
            passes.draw(self._probabilities, vocabulary, words, positions, hot, count, tokens, self._sums)
        return [None if token < 0 else token for token in tokens.tolist()]

    def _filter(self, numbers: passes.Floats, words: passes.Longs, count: int, filtered: int) -> None:
        """Keeps the likeliest tokens of the `filtered` ones of the `count` scaled rows."""
        passes.order(
            self._scaled, self._scaled_bits, self._vocabulary, words, self._hot, count, self._filtered, self._sizes,
            self._ordered, self._ranking, self._keys, self._spare, self._counts,
        )  # fmt: skip
        self._softmax(self._ordered_rows, filtered)
        passes.keep_likeliest(
            self._scaled, self._vocabulary, numbers, self._hot, self._filtered, self._sizes, filtered, self._ordered,
            self._ranking, self._probabilities,
        )  # fmt: skip

    def _softmax(self, rows: Tensor, count: int) -> None:
        """Puts the softmax of the first `count` of `rows` into the buffer for probabilities."""
        into = self._probability_rows
        if count < len(rows):
            rows, into = rows[:count], into[:count]
        torch.softmax(rows, dim=-1, out=into)

    def _masks(self, masks: Sequence[bytes | None], vocabulary: int) -> tuple[passes.Bytes, passes.Integers, int]:
        """The masks that there are, one behind the other; which of them each row has, or −1; and their size."""
        present = [row for row, mask in enumerate(masks) if mask is not None]
        if not present:
            return NO_MASKS, self._no_mask_of, 0
        mask_of = np.full_like(self._no_mask_of, -1)
        mask_of[present] = np.arange(len(present))
        size = -(-vocabulary // 8)
        joined = bytearray().join([(masks[row] or b"")[:size].ljust(size, b"\0") for row in present])
        return np.frombuffer(joined, np.uint8), mask_of, size

    def _allocate(self, rows: int, vocabulary: int) -> None:
        """Makes the buffers, where they are too small or for another vocabulary."""
        if vocabulary == self._vocabulary and rows <= self._rows:
            return
        self._rows, self._vocabulary = rows, vocabulary
        with torch.inference_mode(False):
            self._scaled_rows, self._ordered_rows, self._probability_rows = (
                torch.empty(rows, vocabulary) for _ in range(3)
            )
        self._scaled = self._scaled_rows.view(-1).numpy()
        self._scaled_bits = self._scaled.view(np.int32)
        self._ordered = self._ordered_rows.view(-1).numpy()
        self._probabilities = self._probability_rows.view(-1).numpy()
        self._ranking = np.empty(rows * vocabulary, np.int32)
        self._keys, self._spare = np.empty(vocabulary, np.int32), np.empty(vocabulary, np.int32)
        self._sums = np.empty(vocabulary, np.float64)
        self._counts = np.empty(passes.BYTES * passes.DIGITS, np.int64)
        self._tokens, self._hot, self._filtered, self._sizes = (np.empty(rows, np.int64) for _ in range(4))
        self._no_mask_of = np.full(rows, -1, np.int32)


NO_MASKS = np.zeros(1, np.uint8)


def pack(params: Sequence[SamplingParams]) -> PackedParameters:
    records = packed(params)
    return PackedParameters(np.frombuffer(records, np.float32), np.frombuffer(records, np.int64))


def _flat(logits: Tensor) -> tuple[passes.Floats, int]:
    """The numbers of the rows of `logits`, and how far one row begins behind another."""
    rows, vocabulary = logits.shape
    if logits.is_contiguous():  # as mostly
        return logits.numpy().reshape(-1), vocabulary
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    pitch = logits.stride(0) if rows > 1 else vocabulary
    return logits.as_strided((pitch * (rows - 1) + vocabulary,), (1,)).numpy(), pitch
