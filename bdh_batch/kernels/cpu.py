"""The forward pass on the CPU: plans a batch's passes, shares them out among threads, keeps the buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from bdh_batch.kernels import cpu_drafts, cpu_passes as passes, cpu_state, simd, simd_terms, vector
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cpu_layout import (
    MAX_TOKENS,
    PANEL,
    ROWS,
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
    as_terms,
    kept_of,
    pack,
    pack_columns,
    padded,
    round_up,
    shape_of,
)
from bdh_batch.kernels.vector import LANES, compiled, in_parallel, inlined

PIECES = 4  # for each thread, groups times heads: what the threads share out in a layer
UNEVEN = 1.25  # how much more than its share a thread may get, if that spares all threads the waiting in every layer
# Work is counted in half tokens of a long segment, as measured: a lone token reads and writes its part of a state for
# itself; several go over the whole state once.
LONE, WHOLE, EACH = 5, 9, 2
WORTH_SHARING = 2048  # rows times panels of a product, from which on waking other threads takes less than it saves
NO_FLOATS = np.empty(0, np.float32)
NO_TOKENS = np.empty(0, np.int64)


class CpuKernels:
    """Computes the forward pass with compiled loops on all threads."""

    most_tried = MAX_TOKENS

    def __init__(self, weights: Weights, window: int = 0) -> None:
        #: Whether weights stay bfloat16, which the processor multiplies in pairs.
        self.pairs = weights.embed.dtype == torch.bfloat16 and simd_terms.multiplies_pairs()
        self._shape = shape_of(weights, window, self.pairs)
        self._packed = pack(weights, self._shape)
        self._lm_head = pack_columns(weights.lm_head[None], self._shape)
        self._vocabulary = weights.lm_head.shape[1]
        self._dtype = weights.lm_head.dtype
        self._threads = min(torch.get_num_threads(), vector.most_threads())
        self._work = allocate(MAX_TOKENS, self._shape)
        self._scratch = allocate_scratch(self._threads, self._shape)
        self._counters = np.empty(1 + 2 * weights.layers, np.int64)
        self._tried: Round | None = None  # the last, if it has drafts

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        vector.use_threads(self._threads)
        self._scratch.active.fill(0)
        hidden = torch.empty(len(batch.tokens), self._shape.width)
        flat = flatten(states)
        self._make_room(flat, batch)
        start = 0
        for part in rounds(batch, self._threads, self._shape.heads, fired):
            run(part, self._shape, self._packed, flat, self._work, self._scratch, self._counters, self._threads)
            end = start + len(part.tokens)
            read = torch.from_numpy(self._work.x).view(-1, self._shape.pitch)
            hidden[start:end] = read[: end - start, : self._shape.width]
            start = end
            if batch.drafts and self._tried is None:
                self._tried = part
        if active is not None:
            each = len(batch.tokens) * self._shape.heads * self._shape.neurons
            active.copy_(torch.from_numpy(self._scratch.active.sum(axis=0)[: len(active)] / each))
        return hidden

    def accept(self, states: Tensor, counts: Sequence[int]) -> None:
        part, self._tried = self._tried, None
        assert part is not None, "there were drafts"
        count = np.array(counts[: len(part.slots)], np.int64)
        taken = np.flatnonzero(count)
        if not len(taken):
            return
        first = part.bounds[1:][taken] - part.drafts[taken]
        accepted = cpu_drafts.Accepted(part.kept[taken], count[taken], part.positions[first], part.slots[taken])
        vector.use_threads(self._threads)
        cpu_drafts.add_kept(
            accepted, self._shape, flatten(states), self._work, self._scratch, self._counters, self._threads
        )

    def _make_room(self, states: States, batch: RaggedBatch) -> None:
        """Memory for a batch's drafts, and for copies of such states."""
        self._tried = None
        drafts = batch.drafts
        if drafts and max((end for end, count in zip(batch.bounds[1:], drafts) if count), default=0) > self.most_tried:
            raise ValueError(f"drafts lie behind the first {self.most_tried} tokens of a step")
        if self._scratch.tried.dtype != states.dtype:
            self._scratch = self._scratch._replace(tried=np.empty(self._scratch.tried.shape, states.dtype))
        if drafts and sum(drafts) * self._shape.pitch > self._work.kept_x.shape[1]:
            self._work = self._work._replace(**kept_of(sum(drafts), self._shape))

    def warm(self, states: Tensor) -> None:
        pass  # nothing depends on where the states lie

    def logits(self, hidden: Tensor) -> Tensor:
        rows = padded(self._shape, len(hidden) + ROWS)
        rows[: len(hidden), : self._shape.width] = hidden.to(self._dtype)
        out = aligned(len(hidden), round_up(self._vocabulary, PANEL))
        panels = out.shape[1] // PANEL
        threads = self._threads if len(hidden) * panels >= WORTH_SHARING else 1
        numbers, logits = as_terms(rows), out.view(-1).numpy()
        vector.use_threads(threads)
        project(numbers, len(hidden), self._shape, self._lm_head, self._scratch, logits, self._counters, threads)
        return out[:, : self._vocabulary]


def rounds(batch: RaggedBatch, threads: int, heads: int, fired: Tensor | None = None) -> Iterator[Round]:
    """Cuts a batch in rounds, and those in groups. Neither changes any token's result."""
    tokens, positions = batch.tokens.numpy(), batch.positions.numpy()
    bounds, slots = np.array(batch.bounds, np.int64), np.array(batch.slots, np.int64)
    frozen = np.array(batch.frozen, np.bool_) if batch.frozen else np.zeros(len(slots), np.bool_)
    drafts = np.array(batch.drafts, np.int64) if batch.drafts else np.zeros(len(slots), np.int64)
    kept = drafts.cumsum() - drafts
    vectors = NO_FLOATS if batch.vectors is None else batch.vectors.contiguous().view(-1).numpy()
    for start in range(0, len(tokens), MAX_TOKENS):
        end = min(start + MAX_TOKENS, len(tokens))
        first = np.searchsorted(bounds, start, side="right") - 1
        last = np.searchsorted(bounds, end, side="left")
        cut = bounds[first : last + 1].clip(start, end) - start
        work = work_of(cut)
        groups = group(work, threads)
        apart = bool(largest(groups, work) * threads <= UNEVEN * work[-1])
        if not apart:
            groups = group(work, threads * PIECES // heads)
        yield Round(
            tokens[start:end], positions[start:end], cut, slots[first:last], frozen[first:last],
            drafts[first:last], kept[first:last], groups, apart, vectors, *watched_in(start, end, batch, fired),
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


def largest(groups: Longs, work: Longs) -> int:
    return int(work[groups[0, 1]] - work[groups[0, 0]])


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


@in_parallel
def run(
    part: Round, shape: Shape, weights: Packed, states: States, work: Work, scratches: Scratch, counters: Longs,
    threads: int,
) -> None:  # fmt: skip
    """One round through all the layers. After each loop all threads meet."""
    counters[:] = 0
    if part.apart:
        for thread in numba.prange(threads):
            carry_some(thread, part, shape, weights, states, work, scratches, counters)
        return
    for _ in numba.prange(threads):
        begin_some(part, shape, weights, work, counters)
    for layer in range(shape.layers):
        for thread in numba.prange(threads):
            compute_heads(layer, thread, part, shape, weights, states, work, scratches, counters)
        for _ in numba.prange(threads):
            finish_some(layer, part, shape, work, counters)


@compiled
def carry_some(
    thread: int, part: Round, shape: Shape, weights: Packed, states: States, work: Work, scratches: Scratch,
    counters: Longs,
) -> None:  # fmt: skip
    """Takes whole groups through all the layers: sequences need nothing of each other."""
    scratch = scratch_of(scratches, thread)
    while True:
        chosen = simd.take_work(counters, 0)
        if chosen >= len(part.groups):
            return
        first, last = part.bounds[part.groups[chosen, 0]], part.bounds[part.groups[chosen, 1]]
        for token in range(first, last):
            passes.begin(token, part, shape, weights, work)
        for layer in range(shape.layers):
            for head in range(shape.heads):
                compute_head(chosen, layer, head, part, shape, weights, states, work, scratch)
            for token in range(first, last):
                passes.finish(token, layer, shape, work)


@compiled
def begin_some(part: Round, shape: Shape, weights: Packed, work: Work, counters: Longs) -> None:
    tokens = len(part.tokens)
    while True:
        first = simd.take_work(counters, 0) * ROWS
        if first >= tokens:
            return
        for token in range(first, min(first + ROWS, tokens)):
            passes.begin(token, part, shape, weights, work)


@inlined
def scratch_of(scratches: Scratch, thread: int) -> Scratch:
    return Scratch(
        scratches.fired[thread], scratches.starts[thread], scratches.pairs[thread], scratches.even[thread],
        scratches.odd[thread], scratches.y[thread], scratches.products[thread], scratches.normed[thread],
        scratches.neurons[thread], scratches.gated[thread], scratches.gates[thread], scratches.active[thread],
        scratches.tried[thread],
    )  # fmt: skip


@compiled
def compute_heads(
    layer: int, thread: int, part: Round, shape: Shape, weights: Packed, states: States, work: Work, scratches: Scratch,
    counters: Longs,
) -> None:  # fmt: skip
    """Computes groups of segments in the heads of one layer, until the work counter has run out."""
    scratch = scratch_of(scratches, thread)
    while True:
        piece = simd.take_work(counters, 2 * layer + 1)
        chosen, head = piece // shape.heads, piece % shape.heads
        if chosen >= len(part.groups):
            return
        compute_head(chosen, layer, head, part, shape, weights, states, work, scratch)


@compiled
def compute_head(
    chosen: int, layer: int, head: int, part: Round, shape: Shape, weights: Packed, states: States, work: Work,
    scratch: Scratch,
) -> None:  # fmt: skip
    """Computes a group of segments in one head of a layer."""
    begin, end = part.groups[chosen, 0], part.groups[chosen, 1]
    first, last = part.bounds[begin], part.bounds[end]
    passes.expand(first, last, layer, head, shape, weights, work, scratch)
    if len(part.watched):
        passes.show(first, last, layer, head, part, shape, scratch)
    for segment in range(begin, end):
        attend(segment, first, layer, head, part, shape, states, work, scratch)
    passes.contract(first, last, layer, head, shape, weights, work, scratch)


@compiled
def attend(
    segment: int, tile_start: int, layer: int, head: int, part: Round, shape: Shape, states: States, work: Work,
    scratch: Scratch,
) -> None:  # fmt: skip
    """A sequence's tokens in one head, cut where a block of the window begins, and where drafts do."""
    elements = shape.neurons * shape.width
    layer_size = elements * shape.heads * (2 if shape.half_window else 1)
    state = (part.slots[segment] * shape.layers + layer) * layer_size + head * elements
    first, drafts = part.bounds[segment], part.bounds[segment + 1]
    last = drafts - part.drafts[segment]
    while first < last:
        end = last
        if shape.half_window:
            inside = part.positions[first] % shape.half_window
            end = min(last, first + shape.half_window - inside)
            if inside == 0:
                cpu_state.start_block(states, state, shape.heads * elements, elements)
        row, position = first - tile_start, part.positions[first]
        if part.frozen[segment]:
            cpu_state.read_token(row, state, shape, states, work, scratch)
        elif end == first + 1:
            cpu_state.attend_token(first, row, position, state, shape, states, work, scratch)
        else:
            cpu_state.attend_tokens(first, end, row, position, state, shape, states, work, scratch)
        first = end
    if last < drafts:
        cpu_drafts.attend_drafts(
            last, drafts, last - tile_start, segment, layer, head, state, part, shape, states, work, scratch
        )


@compiled
def finish_some(layer: int, part: Round, shape: Shape, work: Work, counters: Longs) -> None:
    tokens = len(part.tokens)
    while True:
        first = simd.take_work(counters, 2 * layer + 2) * ROWS
        if first >= tokens:
            return
        for token in range(first, min(first + ROWS, tokens)):
            passes.finish(token, layer, shape, work)


@in_parallel
def project(
    rows: Terms, tokens: int, shape: Shape, columns: Terms, scratches: Scratch, out: Floats, counters: Longs,
    threads: int,
) -> None:  # fmt: skip
    """out [tokens, columns] = rows [tokens + ROWS, input_pitch] · packed columns.

    Threads share out the panels, each of which is computed as it would be by one alone."""
    counters[0] = 0
    if threads == 1:  # without the time that waking the others takes
        project_some(rows, tokens, shape, columns, scratches.products[0], out, counters)
        return
    for thread in numba.prange(threads):
        project_some(rows, tokens, shape, columns, scratches.products[thread], out, counters)


@compiled
def project_some(
    rows: Terms, tokens: int, shape: Shape, columns: Terms, products: Floats, out: Floats, counters: Longs
) -> None:
    pitch = shape.input_pitch
    panels = len(columns) // (pitch * PANEL)
    while True:
        panel = simd.take_work(counters, 0)
        if panel >= panels:
            return
        start = panel * pitch * PANEL
        for token in range(0, tokens, ROWS):
            count = min(ROWS, tokens - token)
            passes.product(rows, token * pitch, count, pitch, columns, start, shape.depth, products, 0)
            for i in range(count):
                to = (token + i) * panels * PANEL + panel * PANEL
                simd.store(out, to, simd.load(products, i * PANEL))
                simd.store(out, to + LANES, simd.load(products, i * PANEL + LANES))
