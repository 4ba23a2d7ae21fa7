"""A step as a pool of threads computes it: written down as numbers, and cut in pieces.

A helper's loop is compiled once for arrays that stay. What differs from step to step is in `job`: sizes, and addresses
of arrays that stay where they are until the step's last piece is done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.np.arrayobj import populate_array

from bdh_batch.kernels import cores, cpu_passes as passes, cpu_state, simd, simd_state, team
from bdh_batch.kernels.cpu_layout import (
    INTEGERS,
    PANEL,
    ROWS,
    Columns,
    Floats,
    Longs,
    Packed,
    Round,
    Scratch,
    Shape,
    States,
    Terms,
    Work,
)
from bdh_batch.kernels.cpu_products import product, scale_panel
from bdh_batch.kernels.team import Board
from bdh_batch.kernels.vector import LANES, compiled, inlined, intrinsic

ARRAYS = 11  # of a job, each with its address and its length
MODE, SHOWN_PITCH, TOKENS = 2 * ARRAYS, 2 * ARRAYS + 1, 2 * ARRAYS + 2
JOB = 2 * ARRAYS + 3
ROUND, LOGITS = 0, 1  # modes: what is computed
PANELS_AT_A_TIME = 8  # panels of a product of scores that are one piece


@intrinsic
def array_at(context: Any, kind: Any, number: Any, length: Any) -> Any:
    """The array of so many numbers at an address; of a dtype, or of that of an array."""
    array_type: Any = types.Array(kind.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _array(context, builder, array_type, args[1], [args[2]])

    return array_type(kind, types.int64, types.int64), generate


@intrinsic
def pairs_at(context: Any, number: Any, length: Any) -> Any:
    """The array [length / 2, 2] of int64 at an address."""
    array_type: Any = types.Array(types.int64, 2, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        two = ir.Constant(args[1].type, 2)
        return _array(context, builder, array_type, args[0], [builder.udiv(args[1], two), two])

    return array_type(types.int64, types.int64), generate


def _array(context: Any, builder: Any, array_type: Any, number: Any, shape: list[Any]) -> Any:
    """numba.carray is refused in functions that count no references."""
    array = context.make_array(array_type)(context, builder)
    size = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    strides = [ir.Constant(number.type, size)]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    data = builder.inttoptr(number, array.data.type)
    populate_array(array, data, shape, strides, ir.Constant(number.type, size), None)  # type: ignore[no-untyped-call]
    return array._getvalue()


@inlined
def write_array(job: Longs, index: int, array: Any) -> None:
    job[2 * index], job[2 * index + 1] = cores.start_of(array), array.size


@compiled
def begin_step(part: Round, states: States, shape: Shape, board: Board, job: Longs) -> None:
    """Puts a round on the board: its groups go through the layers, and the rest is written in `job`."""
    write_array(job, 0, part.tokens)
    write_array(job, 1, part.positions)
    write_array(job, 2, part.bounds)
    write_array(job, 3, part.slots)
    write_array(job, 4, part.sources)
    write_array(job, 5, part.frozen)
    write_array(job, 6, part.groups)
    write_array(job, 7, part.vectors)
    write_array(job, 8, part.watched)
    write_array(job, 9, part.shown)
    write_array(job, 10, states)
    job[MODE], job[SHOWN_PITCH] = ROUND, part.shown_pitch
    for group in range(len(part.groups)):
        tokens = part.bounds[part.groups[group, 1]] - part.bounds[part.groups[group, 0]]
        team.set_group(board, group, (tokens + ROWS - 1) // ROWS, shape.heads, 1 + 2 * shape.layers)
    team.begin(board, len(part.groups))


@compiled
def begin_logits(rows: Terms, row_scales: Floats, tokens: int, out: Floats, board: Board, job: Longs) -> None:
    """Puts a product of scores on the board, of rows [tokens + ROWS, input_pitch], which is to fill `out`."""
    write_array(job, 0, rows)
    write_array(job, 1, row_scales)
    write_array(job, 2, out)
    job[MODE], job[TOKENS] = LOGITS, tokens
    team.set_group(board, 0, (len(out) // (tokens * PANEL) + PANELS_AT_A_TIME - 1) // PANELS_AT_A_TIME, 0, 1)
    team.begin(board, 1)


@inlined
def part_of(job: Longs) -> Round:
    return Round(
        array_at(np.int64, job[0], job[1]), array_at(np.int64, job[2], job[3]), array_at(np.int64, job[4], job[5]),
        array_at(np.int64, job[6], job[7]), array_at(np.int64, job[8], job[9]), array_at(np.bool_, job[10], job[11]),
        pairs_at(job[12], job[13]), array_at(np.float32, job[14], job[15]), array_at(np.int64, job[16], job[17]),
        array_at(np.float32, job[18], job[19]), job[SHOWN_PITCH],
    )  # fmt: skip


@compiled
def serve(
    thread: int, board: Board, job: Longs, kind: States, shape: Shape, weights: Packed, columns: Columns, work: Work,
    scratches: Scratch,
) -> None:  # fmt: skip
    """A helper's part in all steps, until the pool ends. `kind` is empty: an array as states are."""
    clock = thread * team.THREAD + team.TIME
    idle_since = cores.now(board.threads, clock)
    while team.read(board.words, team.ENDED) == 0:
        seen = team.read(board.words, team.CHANGES)
        if take_part(thread, board, job, kind, shape, weights, columns, work, scratches):
            idle_since = cores.now(board.threads, clock)
        elif cores.now(board.threads, clock) - idle_since > team.LINGER:
            team.sleep(board, thread, seen)
            idle_since = cores.now(board.threads, clock)


@compiled
def lead(
    thread: int, board: Board, job: Longs, kind: States, shape: Shape, weights: Packed, columns: Columns, work: Work,
    scratches: Scratch,
) -> None:  # fmt: skip
    """The caller's part in the step on the board, as `thread`, which is the leader's number: written here, it would be
    a type of its own, for which all is compiled again. Returns when all of the step is done."""
    while True:
        seen = team.read(board.words, team.CHANGES)
        take_part(thread, board, job, kind, shape, weights, columns, work, scratches)
        if team.read(board.words, team.LEFT) == 0:
            return
        team.wait_for_change(thread, board, seen)


@compiled
def take_part(
    thread: int, board: Board, job: Longs, kind: States, shape: Shape, weights: Packed, columns: Columns, work: Work,
    scratches: Scratch,
) -> int:  # fmt: skip
    """Takes pieces of the step until there is none to be had; returns how many. Stays in a group while it has any, so
    that what threads share out is groups, as long as each has one."""
    generation = team.read(board.words, team.GENERATION)
    groups = board.words[team.GROUPS]
    group, without, taken = thread % max(1, groups), 0, 0
    scratch = scratch_of(scratches, thread)
    team.write(board.threads, thread * team.THREAD + team.BUSY, 1)
    while without < groups:
        counter = team.take(board, group, generation)
        if counter == team.NOTHING:
            group, without = (group + 1) % groups, without + 1
            continue
        loop, piece = (counter >> team.LOOP_BITS) % team.MOST_LOOPS, counter % team.PIECES
        if job[MODE] == LOGITS:
            rows, row_scales = array_at(work.inputs, job[0], job[1]), array_at(np.float32, job[2], job[3])
            out, first = array_at(np.float32, job[4], job[5]), piece * PANELS_AT_A_TIME
            project(first, PANELS_AT_A_TIME, rows, row_scales, job[TOKENS], shape, columns, scratch.products, out)
        else:
            compute(loop, group, piece, part_of(job), shape, weights, array_at(kind, job[20], job[21]), work, scratch)
        team.finish(board, group, counter)
        without, taken = 0, taken + 1
    team.write(board.threads, thread * team.THREAD + team.BUSY, 0)
    return taken


@compiled
def compute(
    loop: int, group: int, piece: int, part: Round, shape: Shape, weights: Packed, states: States, work: Work,
    scratch: Scratch,
) -> None:  # fmt: skip
    """One piece of a group: by turns some rows, and one head in a layer."""
    if loop % 2:
        compute_head(group, loop // 2, piece, part, shape, weights, states, work, scratch)
        return
    first, last = part.bounds[part.groups[group, 0]], part.bounds[part.groups[group, 1]]
    for token in range(first + piece * ROWS, min(first + piece * ROWS + ROWS, last)):
        if loop == 0:
            passes.begin(token, part, shape, weights, work)
        else:
            passes.finish(token, loop // 2 - 1, shape, work)


@inlined
def scratch_of(scratches: Scratch, thread: int) -> Scratch:
    return Scratch(
        scratches.fired[thread], scratches.starts[thread], scratches.pairs[thread], scratches.even[thread],
        scratches.odd[thread], scratches.y[thread], scratches.products[thread], scratches.normed[thread],
        scratches.normed_scales[thread], scratches.neurons[thread], scratches.gated[thread], scratches.gates[thread],
        scratches.active[thread],
    )  # fmt: skip


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
    """A sequence's tokens in one head, cut where a block of the window begins; before them, the copy that it begins
    in, which is in the cache then."""
    elements, blocks = shape.neurons * shape.width, 2 if shape.half_window else 1
    layer_size = elements * shape.heads * blocks
    state = (part.slots[segment] * shape.layers + layer) * layer_size + head * elements
    if part.sources[segment] != part.slots[segment]:
        source = (part.sources[segment] * shape.layers + layer) * layer_size + head * elements
        for block in range(blocks - 1, -1, -1):  # last the one that tokens read
            behind = block * shape.heads * elements
            simd_state.copy_states(states, source + behind, state + behind, elements)
    first, last = part.bounds[segment], part.bounds[segment + 1]
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


@compiled
def project(
    first: int, count: int, rows: Terms, row_scales: Floats, tokens: int, shape: Shape, columns: Columns,
    products: Floats, out: Floats,
) -> None:  # fmt: skip
    """out [tokens, columns] = rows [tokens + ROWS, input_pitch] · packed columns: `count` panels of it from `first` on,
    as far as there are so many. Each is computed as it would be alone."""
    pitch = shape.input_pitch
    panels = len(columns.numbers) // (pitch * PANEL)
    for panel in range(first, min(first + count, panels)):
        start = panel * pitch * PANEL
        for token in range(0, tokens, ROWS):
            height = min(ROWS, tokens - token)
            product(rows, token * pitch, height, pitch, columns.numbers, start, shape.depth, products, 0)
            for i in range(height):
                if shape.rounding == INTEGERS:
                    scale_panel(products, i * PANEL, row_scales[token + i], columns.scales, panel * PANEL)
                to = (token + i) * panels * PANEL + panel * PANEL
                simd.store(out, to, simd.load(products, i * PANEL))
                simd.store(out, to + LANES, simd.load(products, i * PANEL + LANES))
