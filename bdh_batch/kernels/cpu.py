"""The forward pass on the CPU: plans a batch's passes, shares them out among threads, keeps the buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numba
import numpy as np
import torch
from torch import Tensor

from bdh_batch.kernels import cpu_passes as passes, cpu_state, simd, vector
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cpu_layout import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    MAX_TILE,
    MAX_TOKENS,
    PANEL,
    PANELS,
    ROWS,
    Floats,
    Integers,
    Longs,
    Packed,
    Round,
    Scratch,
    Shape,
    States,
    Work,
)
from bdh_batch.kernels.vector import LANES, compiled, in_parallel, inlined

PIECES = 4  # for each thread, groups times heads: what the threads share out in a layer
UNEVEN = 1.25  # how much more than its share a thread may get, if that spares all threads the waiting in every layer
# Work is counted in half tokens of a long segment, as measured: a lone token reads and writes its part of a state for
# itself; several go over the whole state once.
LONE, WHOLE, EACH = 5, 9, 2
WORTH_SHARING = 2048  # rows times panels of a product, from which on waking other threads takes less than it saves
ROUNDING = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


class CpuKernels:
    """Computes the forward pass with compiled loops on all threads."""

    def __init__(self, weights: Weights, window: int = 0) -> None:
        _, heads, width, neurons = weights.encoder.shape
        panels = _round_up(neurons, PANEL) // PANEL
        self._shape = Shape(
            layers=weights.layers,
            heads=heads,
            width=width,
            pitch=_round_up(width, LANES),
            neurons=neurons,
            panels=panels,
            # An odd number of vectors: powers of two would put all tokens' rows in the same few sets of the caches.
            list_pitch=(panels | 1) * LANES,
            fired_pitch=(2 * panels + 1) * LANES,
            rounding=ROUNDING[weights.embed.dtype],
            half_window=window // 2,
        )
        self._packed = pack(weights, self._shape)
        self._lm_head = pack_columns(weights.lm_head[None], self._shape.pitch)
        self._vocabulary = weights.lm_head.shape[1]
        self._dtype = weights.lm_head.dtype
        self._threads = min(torch.get_num_threads(), vector.most_threads())
        self._work = allocate(MAX_TOKENS, self._shape)
        self._scratch = allocate_scratch(self._threads, self._shape)
        self._counters = np.empty(1 + 2 * weights.layers, np.int64)

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        vector.use_threads(self._threads)
        self._scratch.active.fill(0)
        hidden = torch.empty(len(batch.tokens), self._shape.width)
        flat = flatten(states)
        start = 0
        for part in rounds(batch, self._threads, self._shape.heads):
            run(part, self._shape, self._packed, flat, self._work, self._scratch, self._counters, self._threads)
            end = start + len(part.tokens)
            read = torch.from_numpy(self._work.x).view(-1, self._shape.pitch)
            hidden[start:end] = read[: end - start, : self._shape.width]
            start = end
        if active is not None:
            each = len(batch.tokens) * self._shape.heads * self._shape.neurons
            active.copy_(torch.from_numpy(self._scratch.active.sum(axis=0)[: len(active)] / each))
        return hidden

    def warm(self, states: Tensor) -> None:
        pass  # nothing depends on where the states lie

    def logits(self, hidden: Tensor) -> Tensor:
        rows = _aligned(len(hidden) + ROWS, self._shape.pitch).zero_()
        rows[: len(hidden), : self._shape.width] = hidden.to(self._dtype)
        out = _aligned(len(hidden), _round_up(self._vocabulary, PANEL))
        panels = out.shape[1] // PANEL
        threads = self._threads if len(hidden) * panels >= WORTH_SHARING else 1
        numbers, logits = rows.view(-1).numpy(), out.view(-1).numpy()
        vector.use_threads(threads)
        project(numbers, len(hidden), self._shape, self._lm_head, self._scratch, logits, self._counters, threads)
        return out[:, : self._vocabulary]


def rounds(batch: RaggedBatch, threads: int, heads: int) -> Iterator[Round]:
    """Cuts a batch in rounds, and those in groups. Neither changes any token's result."""
    tokens, positions = batch.tokens.numpy(), batch.positions.numpy()
    bounds, slots = np.array(batch.bounds, np.int64), np.array(batch.slots, np.int64)
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
        yield Round(tokens[start:end], positions[start:end], cut, slots[first:last], groups, apart)


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


def pack(weights: Weights, shape: Shape) -> Packed:
    """The weights in the passes' layouts, widened to float32."""
    frequencies = torch.zeros(shape.panels * LANES, dtype=torch.float64)
    frequencies[: shape.neurons // 2] = weights.frequencies[::2].double()
    embed = _aligned(len(weights.embed), shape.pitch).zero_()
    embed[:, : shape.width] = weights.embed
    return Packed(
        embed=embed.view(-1).numpy(),
        encoder=pack_columns(pair_up(weights.encoder[0]), shape.pitch),
        encoder_v=pack_rows(pair_up(weights.encoder_v[0]).mT, shape.pitch),
        decoder=pack_rows(pair_up(weights.decoder[0].view_as(weights.encoder[0].mT).mT).mT, shape.pitch),
        frequencies=frequencies.numpy(),
    )


def pair_up(matrix: Tensor) -> Tensor:
    """Columns [..., N] in the order of the panels, zeros where a panel is not full."""
    neurons = matrix.shape[-1]
    padded = matrix.new_zeros(*matrix.shape[:-1], _round_up(neurons, PANEL))
    padded[..., :neurons] = matrix
    return padded.view(*padded.shape[:-1], -1, LANES, 2).transpose(-1, -2).flatten(-3)


def pack_columns(matrices: Tensor, pitch: int) -> Floats:
    """[heads, D, columns] as [heads, panels, pitch, PANEL]"""
    heads, width, columns = matrices.shape
    panels = _round_up(columns, PANEL) // PANEL
    packed = _aligned(heads, panels * PANEL, pitch).zero_()
    packed[:, :columns, :width] = matrices.mT
    target = _aligned(heads, panels, pitch, PANEL)
    target.copy_(packed.view(heads, panels, PANEL, pitch).transpose(-1, -2))
    return target.view(-1).numpy()


def pack_rows(matrices: Tensor, pitch: int) -> Floats:
    """[heads, rows, D] as [heads, rows, pitch]"""
    heads, rows, width = matrices.shape
    packed = _aligned(heads, rows, pitch).zero_()
    packed[..., :width] = matrices
    return packed.view(-1).numpy()


def allocate(tokens: int, shape: Shape) -> Work:
    return Work(
        x=_floats(tokens * shape.pitch),
        inputs=_floats((tokens + ROWS) * shape.pitch),
        cos=_floats(tokens * shape.list_pitch),
        sin=_floats(tokens * shape.list_pitch),
        z=_floats(tokens * shape.heads * shape.pitch),
    )


def allocate_scratch(threads: int, shape: Shape) -> Scratch:
    """Scratch buffers for all threads: every array has an axis [threads] in front."""

    def integers(*sizes: int) -> Integers:
        return np.empty((threads, *sizes), np.int32)

    lists = MAX_TOKENS * shape.list_pitch
    return Scratch(
        fired=_floats(threads, MAX_TOKENS * shape.fired_pitch),
        starts=integers(MAX_TOKENS * (shape.panels + 1)),
        pairs=integers(lists),
        even=_floats(threads, lists),
        odd=_floats(threads, lists),
        y=_floats(threads, MAX_TOKENS * shape.pitch),
        products=_floats(threads, ROWS * PANEL),
        normed=_floats(threads, (MAX_TILE + ROWS) * shape.pitch),
        neurons=integers(PANELS * PANEL + LANES),
        gated=_floats(threads, PANELS * PANEL + LANES),
        gates=_floats(threads, PANELS * PANEL + LANES),
        active=np.zeros((threads, _round_up(shape.layers, LANES) + LANES), np.int64),
    )


def flatten(states: Tensor) -> States:
    """The numbers of a state pool for the passes; bfloat16 by their bits."""
    flat = states.view(-1)
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def _floats(*sizes: int) -> Floats:
    return cast(Floats, _aligned(*sizes).numpy())


def _aligned(*sizes: int) -> Tensor:
    """torch aligns to 64 bytes, a vector; numpy to 16."""
    return torch.empty(*sizes, dtype=torch.float32)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
            finish_some(2 * layer + 2, part, shape, work, counters)


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
            passes.begin(token, part.tokens[token], part.positions[token], shape, weights, work)
        for layer in range(shape.layers):
            for head in range(shape.heads):
                compute_head(chosen, layer, head, part, shape, weights, states, work, scratch)
            for token in range(first, last):
                passes.finish(token, shape, work)


@compiled
def begin_some(part: Round, shape: Shape, weights: Packed, work: Work, counters: Longs) -> None:
    tokens = len(part.tokens)
    while True:
        first = simd.take_work(counters, 0) * ROWS
        if first >= tokens:
            return
        for token in range(first, min(first + ROWS, tokens)):
            passes.begin(token, part.tokens[token], part.positions[token], shape, weights, work)


@inlined
def scratch_of(scratches: Scratch, thread: int) -> Scratch:
    return Scratch(
        scratches.fired[thread], scratches.starts[thread], scratches.pairs[thread], scratches.even[thread],
        scratches.odd[thread], scratches.y[thread], scratches.products[thread], scratches.normed[thread],
        scratches.neurons[thread], scratches.gated[thread], scratches.gates[thread], scratches.active[thread],
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
    for segment in range(begin, end):
        attend(segment, first, layer, head, part, shape, states, work, scratch)
    passes.contract(first, last, head, shape, weights, work, scratch)


@compiled
def attend(
    segment: int, tile_start: int, layer: int, head: int, part: Round, shape: Shape, states: States, work: Work,
    scratch: Scratch,
) -> None:  # fmt: skip
    """A sequence's tokens in one head, cut where a block of the window begins."""
    elements = shape.neurons * shape.width
    layer_size = elements * shape.heads * (2 if shape.half_window else 1)
    state = (part.slots[segment] * shape.layers + layer) * layer_size + head * elements
    first, last = part.bounds[segment], part.bounds[segment + 1]
    while first < last:
        end = last
        if shape.half_window:
            inside = part.positions[first] % shape.half_window
            end = min(last, first + shape.half_window - inside)
            if inside == 0:
                cpu_state.start_block(states, state, shape.heads * elements, elements)
        row, position = first - tile_start, part.positions[first]
        if end == first + 1:
            cpu_state.attend_token(first, row, position, state, shape, states, work, scratch)
        else:
            cpu_state.attend_tokens(first, end, row, position, state, shape, states, work, scratch)
        first = end


@compiled
def finish_some(counter: int, part: Round, shape: Shape, work: Work, counters: Longs) -> None:
    tokens = len(part.tokens)
    while True:
        first = simd.take_work(counters, counter) * ROWS
        if first >= tokens:
            return
        for token in range(first, min(first + ROWS, tokens)):
            passes.finish(token, shape, work)


@in_parallel
def project(
    rows: Floats, tokens: int, shape: Shape, columns: Floats, scratches: Scratch, out: Floats, counters: Longs,
    threads: int,
) -> None:  # fmt: skip
    """out [tokens, columns] = rows [tokens + ROWS, pitch] · packed columns. Threads share out the panels, each of which
    is computed as it would be by one alone."""
    counters[0] = 0
    if threads == 1:  # without the time that waking the others takes
        project_some(rows, tokens, shape, columns, scratches.products[0], out, counters)
        return
    for thread in numba.prange(threads):
        project_some(rows, tokens, shape, columns, scratches.products[thread], out, counters)


@compiled
def project_some(
    rows: Floats, tokens: int, shape: Shape, columns: Floats, products: Floats, out: Floats, counters: Longs
) -> None:
    panels = len(columns) // (shape.pitch * PANEL)
    while True:
        panel = simd.take_work(counters, 0)
        if panel >= panels:
            return
        start = panel * shape.pitch * PANEL
        for token in range(0, tokens, ROWS):
            count = min(ROWS, tokens - token)
            passes.product(rows, token * shape.pitch, count, shape.pitch, columns, start, shape.width, products, 0)
            for i in range(count):
                to = (token + i) * panels * PANEL + panel * PANEL
                simd.store(out, to, simd.load(products, i * PANEL))
                simd.store(out, to + LANES, simd.load(products, i * PANEL + LANES))
