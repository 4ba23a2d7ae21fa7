"""States in host memory in fewer bits than those they are computed in, for cached prefixes that are not in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Reserve = Callable[[Sequence[int], torch.dtype], Tensor]  # gives memory on the host, by shape and dtype

MOST = 127.0  # the largest int8 in use: as far from zero as the least
SMALLEST = 2.0**-126  # of a scale: the inverse of a smaller one may be infinite
ALL = slice(None)
CPU_BLOCK, GPU_BLOCK = 2**15, 2**24  # numbers that are rounded at a time: as many as fit a core's cache, or many


def narrow_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of one state of `shape`, [..., D], in bfloat16, or in int8 with a float32 scale for each row of D."""
    scales = 0 if dtype != torch.int8 else math.prod(shape[:-1]) * torch.float32.itemsize
    return math.prod(shape) * dtype.itemsize + scales


class NarrowStates:
    """Slots for states in bfloat16, or in int8 with a float32 scale for each row.

    Args:
        shape: of all of them, [slots, layers, ..., N, D].
        dtype: bfloat16 or int8.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, reserve: Reserve) -> None:
        self._values = reserve(shape, dtype)
        self._scales = reserve((*shape[:-1], 1), torch.float32) if dtype == torch.int8 else None

    def __len__(self) -> int:
        return len(self._values)

    def store(self, slot: int, state: Tensor, rows: slice = ALL) -> None:
        """Rounds `rows` of `state` [layers, ..., N, D] to the nearest."""
        for wide, values, scales in self._blocks(slot, state, rows):
            if scales is None:
                values.copy_(wide, non_blocking=True)
            else:
                (_narrow_on_gpu if wide.is_cuda else _narrow)(wide, values, scales)

    def restore(self, slot: int, state: Tensor, rows: slice = ALL) -> None:
        """Writes what is stored over `rows` of `state`."""
        for wide, values, scales in self._blocks(slot, state, rows):
            if scales is None:
                wide.copy_(values, non_blocking=True)
            else:
                (_widen_on_gpu if wide.is_cuda else _widen)(wide, values, scales)

    def _blocks(self, slot: int, state: Tensor, rows: slice) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Cuts rows of a state, and what is or will be stored of them, in the same blocks [rows, D]."""
        width = state.shape[-1]
        size = max(1, (GPU_BLOCK if state.is_cuda else CPU_BLOCK) // width)
        wide, values = state.view(-1, width)[rows], self._values[slot].view(-1, width)[rows]
        scales = None if self._scales is None else self._scales[slot].view(-1, 1)[rows]
        for at in range(0, len(wide), size):
            block = slice(at, at + size)
            yield wide[block], values[block], None if scales is None else scales[block]


# Without a GPU all is done in one thread, by numpy or in blocks too small for a second one: torch's threads would meet
# after each operation on a block, and wait long for each other where they share their cores.


def _narrow(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    wide, scale = rows.float().numpy(), scales.numpy()
    work = np.abs(wide)
    np.multiply(np.max(work, axis=1, keepdims=True), np.float32(1 / MOST), out=scale)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > SMALLEST)
    np.multiply(wide, inverse, out=work)
    np.copyto(values.numpy(), np.rint(work, out=work), casting="unsafe")


def _widen(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    into = rows.numpy() if rows.dtype == torch.float32 else np.empty(rows.shape, np.float32)
    np.copyto(into, values.numpy())
    np.multiply(into, scales.numpy(), out=into)
    if rows.dtype != torch.float32:
        rows.copy_(torch.from_numpy(into))


def _narrow_on_gpu(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    scale = rows.abs().amax(dim=-1, keepdim=True).float().mul_(1 / MOST)
    inverse = torch.where(scale > SMALLEST, 1 / scale, 0.0)
    values.copy_(torch.mul(rows.float(), inverse).round_().to(torch.int8), non_blocking=True)
    scales.copy_(scale, non_blocking=True)


def _widen_on_gpu(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    device = rows.device
    rows.copy_(values.to(device, non_blocking=True).float().mul_(scales.to(device, non_blocking=True)))
