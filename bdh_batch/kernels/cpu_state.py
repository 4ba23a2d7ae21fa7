"""The state pass on the CPU: y = q · S, then S += q ⊗ x, over the rows of one head whose neuron pair fired.

Every sum is one chain of fused multiply-adds, in an order that depends on the token's list alone. A state in bfloat16
is widened as it is read. What is written back is rounded up or down at random, by odds that keep its mean: a state only
ever sums, and rounding to the nearest would in time drop every small addend. The noise follows from the position and
the position in the state, so that a sequence has the same bits in any company.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bdh_batch.kernels import simd, simd_state, simd_terms as terms, vector
from bdh_batch.kernels.cpu_layout import PANEL, Floats, Scratch, Shape, States, Work
from bdh_batch.kernels.vector import LANES, compiled, inlined

LOOKAHEAD = 12  # pairs between the prefetch of state rows and their use


class Rows(NamedTuple):
    """The state of one head, as one token meets it."""

    states: States
    start: int  # where the head's N rows of D begin
    noise: vector.Vector  # what this token's sums are rounded by, where states are bfloat16
    x: Floats  # what is added, [T, pitch] in the order of `simd_state.load_two`


@inlined
def rows_of(states: States, start: int, position: int, work: Work) -> Rows:
    return Rows(states, start, simd_state.noise(position), simd_state.choose(states, work.x, work.x_apart))


@inlined
def fold_two(rows: Rows, at: int, q: Any, x: Any, y: Any, noise: Any) -> Any:
    """Two vectors of one state row: returns y + q · S, and adds q ⊗ x to S."""
    first, second = simd_state.load_two(rows.states, rows.start + at)
    sums = simd.fma(q, x[0], first), simd.fma(q, x[1], second)
    simd_state.store_two(rows.states, rows.start + at, sums[0], sums[1], noise)
    return simd.fma(q, first, y[0]), simd.fma(q, second, y[1])


@inlined
def fold_row(rows: Rows, at: int, q: Any, x: Any, y: Any, noise: Any) -> Any:
    """As `fold_two`, of one vector."""
    row = simd_state.load_state(rows.states, rows.start + at)
    simd_state.store_state(rows.states, rows.start + at, simd.fma(q, x, row), noise)
    return simd.fma(q, row, y)


@inlined
def fold_row_end(rows: Rows, at: int, q: Any, x: Any, y: Any, noise: Any, count: int) -> Any:
    """As `fold_row`, of the last `count` lanes of a row."""
    row = simd_state.load_state_end(rows.states, rows.start + at, count)
    simd_state.store_state_end(rows.states, rows.start + at, simd.fma(q, x, row), noise, count)
    return simd.fma(q, row, y)


@inlined
def two_of(array: Floats, at: int) -> Any:
    return simd.load(array, at), simd.load(array, at + LANES)


@inlined
def fold_pair(rows: Rows, at: int, width: int, scratch: Scratch, entry: int, x: int, y: int) -> None:
    """The two state rows of one pair of neurons, at `at`: what the token reads of them, and what it writes."""
    q0, q1 = terms.spread(scratch.even, entry), terms.spread(scratch.odd, entry)
    noise0, noise1 = simd_state.vary(rows.noise, at), simd_state.vary(rows.noise, at + width)
    twos, whole = width // PANEL * PANEL, width // LANES * LANES
    for i in range(0, twos, PANEL):
        x_now, y_now = two_of(rows.x, x + i), two_of(scratch.y, y + i)
        y_now = fold_two(rows, at + i, q0, x_now, y_now, noise0)
        y_now = fold_two(rows, at + width + i, q1, x_now, y_now, noise1)
        simd.store(scratch.y, y + i, y_now[0])
        simd.store(scratch.y, y + i + LANES, y_now[1])
    for i in range(twos, whole, LANES):
        x_one, y_one = simd.load(rows.x, x + i), simd.load(scratch.y, y + i)
        y_one = fold_row(rows, at + i, q0, x_one, y_one, noise0)
        simd.store(scratch.y, y + i, fold_row(rows, at + width + i, q1, x_one, y_one, noise1))
    rest = width - whole
    if rest:
        x_end, y_end = simd.load(rows.x, x + whole), simd.load(scratch.y, y + whole)
        y_end = fold_row_end(rows, at + whole, q0, x_end, y_end, noise0, rest)
        simd.store(scratch.y, y + whole, fold_row_end(rows, at + width + whole, q1, x_end, y_end, noise1, rest))


@inlined
def fold_two_pairs(
    rows: Rows, at: int, then: int, soon: int, later: int, width: int, scratch: Scratch, entry: int, x: int, y: int
) -> None:
    """As `fold_pair` of an entry and of the next one, but x and y move once. Prefetches `soon` and `later`, if ≥ 0."""
    twos = width // PANEL * PANEL
    q0, q1 = terms.spread(scratch.even, entry), terms.spread(scratch.odd, entry)
    q2, q3 = terms.spread(scratch.even, entry + 1), terms.spread(scratch.odd, entry + 1)
    noise0, noise1 = simd_state.vary(rows.noise, at), simd_state.vary(rows.noise, at + width)
    noise2, noise3 = simd_state.vary(rows.noise, then), simd_state.vary(rows.noise, then + width)
    for i in range(0, twos, PANEL):
        if soon >= 0:
            simd_state.prefetch_states(rows.states, rows.start + soon + 2 * i)
            simd_state.prefetch_states(rows.states, rows.start + soon + 2 * i + PANEL)
            simd_state.prefetch_states(rows.states, rows.start + later + 2 * i)
            simd_state.prefetch_states(rows.states, rows.start + later + 2 * i + PANEL)
        x_now, y_now = two_of(rows.x, x + i), two_of(scratch.y, y + i)
        y_now = fold_two(rows, at + i, q0, x_now, y_now, noise0)
        y_now = fold_two(rows, at + width + i, q1, x_now, y_now, noise1)
        y_now = fold_two(rows, then + i, q2, x_now, y_now, noise2)
        y_now = fold_two(rows, then + width + i, q3, x_now, y_now, noise3)
        simd.store(scratch.y, y + i, y_now[0])
        simd.store(scratch.y, y + i + LANES, y_now[1])
    whole = width // LANES * LANES
    for i in range(twos, whole, LANES):
        x_one, y_one = simd.load(rows.x, x + i), simd.load(scratch.y, y + i)
        y_one = fold_row(rows, at + i, q0, x_one, y_one, noise0)
        y_one = fold_row(rows, at + width + i, q1, x_one, y_one, noise1)
        y_one = fold_row(rows, then + i, q2, x_one, y_one, noise2)
        simd.store(scratch.y, y + i, fold_row(rows, then + width + i, q3, x_one, y_one, noise3))
    rest = width - whole
    if rest:
        x_end, y_end = simd.load(rows.x, x + whole), simd.load(scratch.y, y + whole)
        y_end = fold_row_end(rows, at + whole, q0, x_end, y_end, noise0, rest)
        y_end = fold_row_end(rows, at + width + whole, q1, x_end, y_end, noise1, rest)
        y_end = fold_row_end(rows, then + whole, q2, x_end, y_end, noise2, rest)
        simd.store(scratch.y, y + whole, fold_row_end(rows, then + width + whole, q3, x_end, y_end, noise3, rest))


@inlined
def settle(states: States, first: int, last: int, shape: Shape, scratch: Scratch) -> None:
    """Brings y of some rows from the order of `simd_state.load_two` into that of the model."""
    for row in range(first, last):
        for i in range(0, shape.width // PANEL * PANEL, PANEL):
            simd_state.put_together(states, scratch.y, row * shape.pitch + i)


@compiled
def attend_token(
    token: int, row: int, position: int, state: int, shape: Shape, states: States, work: Work, scratch: Scratch
) -> None:
    """One pass over the rows of `states` from `state` on whose pair fired: y = q · S, then S += q ⊗ x.

    The token's lists and its y are row `row` of the scratch buffers.
    """
    rows = rows_of(states, state, position, work)
    x, y = token * shape.pitch, row * shape.pitch
    for i in range(y, y + shape.pitch):
        scratch.y[i] = 0
    size = 2 * shape.width
    first = row * shape.list_pitch
    last = first + scratch.starts[row * (shape.panels + 1) + shape.panels]
    for entry in range(first, min(first + LOOKAHEAD, last)):
        for i in range(0, size, PANEL):
            simd_state.prefetch_states(states, state + scratch.pairs[entry] * size + i)
    entry = first
    while entry + 1 < last:
        soon = scratch.pairs[min(entry + LOOKAHEAD, last - 1)] * size
        later = scratch.pairs[min(entry + LOOKAHEAD + 1, last - 1)] * size
        at, then = scratch.pairs[entry] * size, scratch.pairs[entry + 1] * size
        fold_two_pairs(rows, at, then, soon, later, shape.width, scratch, entry, x, y)
        entry += 2
    if entry < last:
        fold_pair(rows, scratch.pairs[entry] * size, shape.width, scratch, entry, x, y)
    settle(states, row, row + 1, shape, scratch)


@inlined
def read_pair(rows: Rows, at: int, soon: int, width: int, scratch: Scratch, entry: int, y: int) -> None:
    """What the token reads of the two state rows of one pair of neurons, at `at`. Prefetches those at `soon`."""
    q0, q1 = terms.spread(scratch.even, entry), terms.spread(scratch.odd, entry)
    even, odd, soon = rows.start + at, rows.start + at + width, rows.start + soon
    twos, whole = width // PANEL * PANEL, width // LANES * LANES
    for i in range(0, twos, PANEL):
        simd_state.prefetch_states(rows.states, soon + 2 * i)
        simd_state.prefetch_states(rows.states, soon + 2 * i + PANEL)
        y0, y1 = two_of(scratch.y, y + i)
        first, second = simd_state.load_two(rows.states, even + i)
        y0, y1 = simd.fma(q0, first, y0), simd.fma(q0, second, y1)
        first, second = simd_state.load_two(rows.states, odd + i)
        simd.store(scratch.y, y + i, simd.fma(q1, first, y0))
        simd.store(scratch.y, y + i + LANES, simd.fma(q1, second, y1))
    for i in range(twos, whole, LANES):
        y_now = simd.fma(q0, simd_state.load_state(rows.states, even + i), simd.load(scratch.y, y + i))
        simd.store(scratch.y, y + i, simd.fma(q1, simd_state.load_state(rows.states, odd + i), y_now))
    rest = width - whole
    if rest:
        y_end = simd.load(scratch.y, y + whole)
        y_end = simd.fma(q0, simd_state.load_state_end(rows.states, even + whole, rest), y_end)
        y_end = simd.fma(q1, simd_state.load_state_end(rows.states, odd + whole, rest), y_end)
        simd.store(scratch.y, y + whole, y_end)


@compiled
def read_token(row: int, state: int, shape: Shape, states: States, work: Work, scratch: Scratch) -> None:
    """As `attend_token`, but leaves the states as they are: y = q · S, with the same bits."""
    rows = rows_of(states, state, 0, work)
    y = row * shape.pitch
    for i in range(y, y + shape.pitch):
        scratch.y[i] = 0
    size = 2 * shape.width
    first = row * shape.list_pitch
    last = first + scratch.starts[row * (shape.panels + 1) + shape.panels]
    for entry in range(first, last):
        soon = scratch.pairs[min(entry + LOOKAHEAD, last - 1)] * size
        read_pair(rows, scratch.pairs[entry] * size, soon, shape.width, scratch, entry, y)
    settle(states, row, row + 1, shape, scratch)


@inlined
def fold_panel(rows: Rows, panel: int, token: int, row: int, shape: Shape, scratch: Scratch) -> None:
    """One token's pairs in one panel."""
    size, x, y = 2 * shape.width, token * shape.pitch, row * shape.pitch
    entries, cursor = row * shape.list_pitch, row * (shape.panels + 1) + panel
    entry, end = entries + scratch.starts[cursor], entries + scratch.starts[cursor + 1]
    while entry + 1 < end:
        at, then = scratch.pairs[entry] * size, scratch.pairs[entry + 1] * size
        fold_two_pairs(rows, at, then, -1, -1, shape.width, scratch, entry, x, y)
        entry += 2
    if entry < end:
        fold_pair(rows, scratch.pairs[entry] * size, shape.width, scratch, entry, x, y)


@compiled
def attend_tokens(
    first: int, last: int, first_row: int, position: int, state: int, shape: Shape, states: States, work: Work,
    scratch: Scratch,
) -> None:  # fmt: skip
    """As `attend_token` for each of one sequence's tokens, in their order, with the same bits.

    Goes panel by panel, whose state rows stay in the first cache for all the tokens.
    """
    for i in range(first_row * shape.pitch, (first_row + last - first) * shape.pitch):
        scratch.y[i] = 0
    for panel in range(shape.panels):
        for token in range(first, last):
            rows = rows_of(states, state, position + token - first, work)
            fold_panel(rows, panel, token, first_row + token - first, shape, scratch)
    settle(states, first_row, first_row + last - first, shape, scratch)


@compiled
def start_block(states: States, state: int, size: int, elements: int) -> None:
    """The oldest block leaves the window: S −= A, then A = S; A lies `size` elements behind S."""
    to_nearest = simd_state.half()
    whole = elements // LANES * LANES
    for i in range(state, state + whole, LANES):
        left = simd.subtract(simd_state.load_state(states, i), simd_state.load_state(states, i + size))
        simd_state.store_state(states, i, left, to_nearest)
        simd_state.store_state(states, i + size, left, to_nearest)
    rest, i = elements - whole, state + whole
    if rest:
        left = simd.subtract(
            simd_state.load_state_end(states, i, rest), simd_state.load_state_end(states, i + size, rest)
        )
        simd_state.store_state_end(states, i, left, to_nearest, rest)
        simd_state.store_state_end(states, i + size, left, to_nearest, rest)
