"""The forward pass on the CPU: cuts a batch in rounds and groups, has threads compute them, keeps the buffers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdh_batch.kernels import cpu_step, simd_terms, team, vector
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cpu_layout import (
    MAX_TOKENS,
    PANEL,
    Columns,
    Flags,
    Floats,
    Longs,
    Packed,
    Round,
    Scratch,
    Shape,
    States,
    Terms,
    Work,
    aligned,
    allocate,
    allocate_scratch,
    head_scales,
    pack,
    pack_columns,
    round_up,
    rows_of,
    shape_of,
)

PIECES_PER_THREAD = 2  # at least: groups times heads, which are what the threads share out in a layer
# Work is counted in half tokens of a long segment, as measured: a lone token reads and writes its part of a state for
# itself; several go over the whole state once.
LONE, WHOLE, EACH = 5, 9, 2
WORTH_SHARING = 2048  # rows times panels of a product, from which on waking other threads takes less than it saves
NO_FLOATS = np.empty(0, np.float32)
NO_TOKENS = np.empty(0, np.int64)


class CpuKernels:
    """Computes the forward pass with compiled loops on all threads."""

    def __init__(self, weights: Weights, window: int = 0) -> None:
        #: Whether weights stay as narrow as they are, and are multiplied in pairs.
        self.pairs = weights.dtype == torch.int8 or (weights.dtype == torch.bfloat16 and simd_terms.multiplies_pairs())
        self._shape = shape_of(weights, window, self.pairs)
        self._packed = pack(weights, self._shape)
        self._head = Columns(pack_columns(weights.lm_head[None], self._shape), head_scales(weights))
        self._vocabulary = weights.lm_head.shape[1]
        self._threads = min(torch.get_num_threads(), vector.most_threads())
        self._work = allocate(MAX_TOKENS, self._shape)
        self._scratch = allocate_scratch(self._threads, self._shape)
        self._hidden = torch.from_numpy(self._work.x).view(-1, self._shape.pitch)[:, : self._shape.width]
        self._steady, self._kept = 0, list[Cut]()  # the cuts of the last batch, by its `steady`
        self._step_threads: dict[np.dtype[Any], StepThreads] = {}  # by the dtype of states, of which an engine has one
        self._process = os.getpid()

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        self._scratch.active.fill(0)
        flat, cuts = flatten(states), self._cuts(batch)
        step_threads = self._threads_for(flat.dtype)
        found = []
        for part in rounds(batch, cuts, fired):
            step_threads.compute(part, flat)
            found.append(self._hidden[: len(part.tokens)].clone())
        hidden = found[0] if len(found) == 1 else torch.cat(found)
        if active is not None:
            each = len(batch.tokens) * self._shape.heads * self._shape.neurons
            active.copy_(torch.from_numpy(self._scratch.active.sum(axis=0)[: len(active)] / each))
        return hidden

    def _cuts(self, batch: RaggedBatch) -> list[Cut]:
        """Those of `batch`, which are kept for the next ones that are as steady."""
        if batch.steady != self._steady or not batch.steady:
            self._steady, self._kept = batch.steady, cut(batch, self._threads, self._shape.heads)
        return self._kept

    def _threads_for(self, dtype: np.dtype[Any]) -> StepThreads:
        if self._process != os.getpid():  # a fork, which has none of the threads
            self._process, self._step_threads = os.getpid(), {}
        if dtype not in self._step_threads:
            arrays = (self._packed, self._head, self._work, self._scratch)
            self._step_threads[dtype] = StepThreads(self._threads, np.empty(0, dtype), self._shape, *arrays)
        return self._step_threads[dtype]

    def warm(self, states: Tensor) -> None:
        pass  # nothing depends on where the states lie

    def logits(self, hidden: Tensor) -> Tensor:
        rows, row_scales = rows_of(hidden, self._shape)
        out = aligned(len(hidden), round_up(self._vocabulary, PANEL))
        logits = out.view(-1).numpy()
        panels = out.shape[1] // PANEL
        if self._threads > 1 and len(hidden) * panels >= WORTH_SHARING:
            dtype = next(iter(self._step_threads), np.dtype(np.float32))  # any will do
            self._threads_for(dtype).project(rows, row_scales, len(hidden), logits)
        else:
            products = self._scratch.products[0]
            cpu_step.project(0, panels, rows, row_scales, len(hidden), self._shape, self._head, products, logits)
        return out if out.shape[1] == self._vocabulary else out[:, : self._vocabulary]


class StepThreads:
    """The threads that compute a model's steps on states of one dtype.

    Args:
        kind: an empty array of that dtype.
        columns: the lm_head.
    """

    def __init__(
        self,
        threads: int,
        kind: States,
        shape: Shape,
        weights: Packed,
        columns: Columns,
        work: Work,
        scratches: Scratch,
    ) -> None:
        self._shape, self._job = shape, np.zeros(cpu_step.JOB, np.int64)
        self._board = team.new_board(threads, MAX_TOKENS)
        fixed = (self._board, self._job, kind, shape, weights, columns, work, scratches)
        self._lead = partial(cpu_step.lead, team.LEADER, *fixed)
        self._pool = team.ThreadPool(threads, self._board, lambda number: cpu_step.serve(number, *fixed))

    def compute(self, part: Round, states: States) -> None:
        """Computes a round, of which `states` and the work's arrays are changed."""
        self._pool.check()
        cpu_step.begin_step(part, states, self._shape, self._board, self._job)
        self._lead()

    def project(self, rows: Terms, row_scales: Floats, tokens: int, out: Floats) -> None:
        """Computes `out` [tokens, columns] from rows [tokens + ROWS, input_pitch] and what they are multiples of."""
        self._pool.check()
        cpu_step.begin_logits(rows, row_scales, tokens, out, self._board, self._job)
        self._lead()


class Cut(NamedTuple):
    """What a round has beside its tokens: they are those of the batch from `start` to `end` − 1. See `Round`."""

    start: int
    end: int
    bounds: Longs
    slots: Longs
    sources: Longs
    frozen: Flags
    groups: Longs


def cut(batch: RaggedBatch, threads: int, heads: int) -> list[Cut]:
    """Cuts a batch in rounds, and those in groups. Neither changes any token's result."""
    bounds, slots = np.array(batch.bounds, np.int64), np.array(batch.slots, np.int64)
    sources = np.array(batch.sources, np.int64) if batch.sources else slots
    frozen = np.array(batch.frozen, np.bool_) if batch.frozen else np.zeros(len(slots), np.bool_)
    cuts = []
    for start in range(0, len(batch.tokens), MAX_TOKENS):
        end = min(start + MAX_TOKENS, len(batch.tokens))
        first = np.searchsorted(bounds, start, side="right") - 1
        last = np.searchsorted(bounds, end, side="left")
        within = bounds[first : last + 1].clip(start, end) - start
        begun = np.where(bounds[:-1] < start, slots, sources)  # what a round has begun, the next ones go on with
        most = max(threads, threads * PIECES_PER_THREAD // heads) if threads > 1 else 1
        groups = group(work_of(within), most)
        cuts.append(Cut(start, end, within, slots[first:last], begun[first:last], frozen[first:last], groups))
    return cuts


def rounds(batch: RaggedBatch, cuts: Sequence[Cut], fired: Tensor | None = None) -> Iterator[Round]:
    """The rounds of a batch that `cut` has cut so, or one that is as steady."""
    tokens, positions = batch.tokens.contiguous().numpy(), batch.positions.contiguous().numpy()  # helpers get addresses
    vectors = NO_FLOATS if batch.vectors is None else batch.vectors.contiguous().view(-1).numpy()
    for each in cuts:
        own, watched = slice(each.start, each.end), watched_in(each.start, each.end, batch, fired)
        yield Round(
            tokens[own], positions[own], each.bounds, each.slots, each.sources, each.frozen, each.groups, vectors,
            *watched,
        )  # fmt: skip


def watched_in(start: int, end: int, batch: RaggedBatch, fired: Tensor | None) -> tuple[Longs, Floats, int]:
    """Which of a batch's tokens from `start` to `end` − 1 are to be shown, and where in `fired`, as `Round` has it."""
    if fired is None:
        return NO_TOKENS, NO_FLOATS, 0
    watched = np.array(batch.watched, np.int64)
    first, last = np.searchsorted(watched, [start, end])
    _, total, heads, neurons = fired.shape
    rows = fired.view(-1).numpy()[first * heads * neurons :]
    return watched[first:last] - start, rows, total * heads * neurons


def work_of(bounds: Longs) -> Longs:
    """As `bounds` of tokens, those of the segments' work."""
    tokens = np.diff(bounds)
    return np.concatenate([[0], np.where(tokens == 1, LONE, WHOLE + EACH * tokens).cumsum()])


def group(work: Longs, groups: int) -> Longs:
    """Neighbouring segments together until they have their share of the work; the largest groups come first."""
    share = -(-int(work[-1]) // max(1, groups))
    found = [0]
    for segment in range(1, len(work) - 1):
        if work[segment + 1] - work[found[-1]] > share:
            found.append(segment)
    found.append(len(work) - 1)
    sizes = np.diff(work[found])
    return np.stack([found[:-1], found[1:]], axis=1)[np.argsort(-sizes, kind="stable")].astype(np.int64)


def flatten(states: Tensor) -> States:
    """The numbers of a state pool for the passes; bfloat16 by their bits."""
    flat = states.view(-1)
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
