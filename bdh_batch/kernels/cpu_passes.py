"""The compiled passes of a step on the CPU: what one thread does for one piece of a layer. `README.md` derives them.

Everything is flat and float32, rows padded with zeros to a multiple of 16 (`Shape.pitch`). The neurons of a head are
grouped in panels of 32, the even members of 16 RoPE pairs and then the odd ones, so that a pair is the same lane of two
vectors. Every sum is one chain of fused multiply-adds, or one tree, in an order that depends on the model alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bdh_batch.kernels import simd
from bdh_batch.kernels.simd import LANES, compiled, inlined, reassociated

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

PANEL = 2 * LANES  # neurons
ROWS = 8  # of one product; with two vectors of columns its sums fill half of AVX-512's registers
MAX_TILE = 32  # tokens that share a reading of the weights
PANELS = 4  # that are gated before their decoder rows are added, all in the first two caches
LOOKAHEAD = 12  # pairs between the prefetch of state rows and their use
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # what the inputs of products are rounded to


class Shape(NamedTuple):
    """The sizes of a model, and how its arrays are laid out."""

    layers: int
    heads: int
    width: int  # D
    pitch: int  # elements from one row of a padded array to the next
    neurons: int  # N
    panels: int  # of a head
    list_pitch: int  # elements from one token's list of pairs in a head to the next
    fired_pitch: int  # the same for its activations
    rounding: int
    half_window: int  # tokens of a block; 0 attends to everything


class Packed(NamedTuple):
    """The weights as the passes read them."""

    embed: Floats  # [V, pitch]
    encoder: Floats  # [heads, panels, pitch, PANEL]
    encoder_v: Floats  # [heads, panels, pitch, PANEL]
    decoder: Floats  # [heads, panels, PANEL, pitch], rows as they are
    frequencies: npt.NDArray[np.float64]  # [panels * 16], of each pair


class Work(NamedTuple):
    """What the passes of a round of T tokens share."""

    x: Floats  # [T, pitch]
    inputs: Floats  # [T + ROWS, pitch]: x as products take it
    cos: Floats  # [T, list_pitch]
    sin: Floats
    z: Floats  # [T, heads, pitch]: each head's share of the decoder's sum


class Desk(NamedTuple):
    """Where one thread does a piece of work: some tokens in one head. They are counted from the piece's first."""

    fired: Floats  # [tokens, fired_pitch]
    starts: Integers  # [tokens, panels + 1]: where a panel's entries begin in the three lists after this one
    pairs: Integers  # [tokens, list_pitch]: the pairs that fired, rising
    even: Floats  # [tokens, list_pitch]: their activations after RoPE
    odd: Floats
    y: Floats  # [tokens, pitch]
    products: Floats  # [ROWS, PANEL]
    normed: Floats  # [MAX_TILE + ROWS, pitch]: a tile's y after LayerNorm
    passed: Integers  # [MAX_TILE, PANELS * PANEL]: neurons of some panels that passed their gate, for each token
    gated: Floats  # [MAX_TILE, PANELS * PANEL]: their activations times their gates
    counts: Integers  # [MAX_TILE]: how many those are


@inlined
def rounded(value: Any, rounding: int) -> Any:
    if rounding == FLOAT16:
        return simd.through_half(value)
    if rounding == BFLOAT16:
        return simd.through_bfloat(value)
    return value


@reassociated
def layer_norm(source: Floats, start: int, shape: Shape, target: Floats, to: int) -> None:
    """One row; zeros behind its end."""
    mean = np.float32(0)
    for i in range(shape.width):
        mean += source[start + i]
    mean /= np.float32(shape.width)
    variance = np.float32(0)
    for i in range(shape.width):
        variance += (source[start + i] - mean) ** 2
    scale = np.float32(1) / np.sqrt(variance / np.float32(shape.width) + np.float32(1e-5))
    for i in range(shape.width):
        target[to + i] = (source[start + i] - mean) * scale
    for i in range(shape.width, shape.pitch):
        target[to + i] = 0


@compiled
def set_inputs(token: int, shape: Shape, work: Work) -> None:
    for i in range(token * shape.pitch, (token + 1) * shape.pitch):
        work.inputs[i] = rounded(work.x[i], shape.rounding)


@compiled
def begin(token: int, identity: int, position: int, shape: Shape, weights: Packed, work: Work) -> None:
    """Looks a token up, and sets its RoPE angles."""
    layer_norm(weights.embed, identity * shape.pitch, shape, work.x, token * shape.pitch)
    set_inputs(token, shape, work)
    set_angles(np.float64(position), weights.frequencies, token * shape.list_pitch, work)


@compiled
def set_angles(position: float, frequencies: npt.NDArray[np.float64], start: int, work: Work) -> None:
    """cos and sin of a position's angles, by Taylor's series on an eighth of a turn: exact to float32."""
    to_integer = np.float64(1.5 * 2**52)  # adding and taking away rounds to the nearest
    for i in range(len(frequencies)):
        turns = position * frequencies[i]
        quarter = (4 * turns + to_integer) - to_integer
        angle = (turns - 0.25 * quarter) * (2 * np.pi)
        square = angle * angle
        sin = angle * (1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72 * (1 - square / 110
            * (1 - square / 156))))))  # fmt: skip
        cos = 1 - square / 2 * (1 - square / 12 * (1 - square / 30 * (1 - square / 56 * (1 - square / 90
            * (1 - square / 132 * (1 - square / 182))))))  # fmt: skip
        halves = (0.5 * quarter + to_integer) - to_integer
        odd = quarter != 2 * halves
        quadrant = quarter - 4 * ((0.25 * quarter + to_integer) - to_integer)  # −2 … 2
        work.cos[start + i] = (-sin if quadrant > 0 else sin) if odd else (cos if quadrant == 0 else -cos)
        work.sin[start + i] = (cos if quadrant > 0 else -cos) if odd else (sin if quadrant == 0 else -sin)


@inlined
def product_row(a: Floats, row: int, panel: Floats, start: int, depth: int, out: Floats, to: int) -> None:
    """out [PANEL] = a row of a · panel [depth, PANEL]."""
    even, odd = simd.splat(np.float32(0)), simd.splat(np.float32(0))
    for k in range(depth):
        a0 = simd.spread(a, row + k)
        even = simd.fma(a0, simd.load(panel, start + k * PANEL), even)
        odd = simd.fma(a0, simd.load(panel, start + k * PANEL + LANES), odd)
    simd.store(out, to, even)
    simd.store(out, to + LANES, odd)


@inlined
def product_rows(a: Floats, row: int, pitch: int, panel: Floats, start: int, depth: int, out: Floats, to: int) -> None:
    """out [ROWS, PANEL] = ROWS rows of a · panel [depth, PANEL]; the bits are those of `product_row`."""
    e0 = e1 = e2 = e3 = e4 = e5 = e6 = e7 = simd.splat(np.float32(0))
    o0 = o1 = o2 = o3 = o4 = o5 = o6 = o7 = simd.splat(np.float32(0))
    for k in range(depth):
        even, odd = simd.load(panel, start + k * PANEL), simd.load(panel, start + k * PANEL + LANES)
        at = row + k
        a0, a1 = simd.spread(a, at), simd.spread(a, at + pitch)
        e0, o0, e1, o1 = simd.fma(a0, even, e0), simd.fma(a0, odd, o0), simd.fma(a1, even, e1), simd.fma(a1, odd, o1)
        a2, a3 = simd.spread(a, at + 2 * pitch), simd.spread(a, at + 3 * pitch)
        e2, o2, e3, o3 = simd.fma(a2, even, e2), simd.fma(a2, odd, o2), simd.fma(a3, even, e3), simd.fma(a3, odd, o3)
        a4, a5 = simd.spread(a, at + 4 * pitch), simd.spread(a, at + 5 * pitch)
        e4, o4, e5, o5 = simd.fma(a4, even, e4), simd.fma(a4, odd, o4), simd.fma(a5, even, e5), simd.fma(a5, odd, o5)
        a6, a7 = simd.spread(a, at + 6 * pitch), simd.spread(a, at + 7 * pitch)
        e6, o6, e7, o7 = simd.fma(a6, even, e6), simd.fma(a6, odd, o6), simd.fma(a7, even, e7), simd.fma(a7, odd, o7)
    simd.store(out, to + 0 * PANEL, e0)
    simd.store(out, to + 0 * PANEL + LANES, o0)
    simd.store(out, to + 1 * PANEL, e1)
    simd.store(out, to + 1 * PANEL + LANES, o1)
    simd.store(out, to + 2 * PANEL, e2)
    simd.store(out, to + 2 * PANEL + LANES, o2)
    simd.store(out, to + 3 * PANEL, e3)
    simd.store(out, to + 3 * PANEL + LANES, o3)
    simd.store(out, to + 4 * PANEL, e4)
    simd.store(out, to + 4 * PANEL + LANES, o4)
    simd.store(out, to + 5 * PANEL, e5)
    simd.store(out, to + 5 * PANEL + LANES, o5)
    simd.store(out, to + 6 * PANEL, e6)
    simd.store(out, to + 6 * PANEL + LANES, o6)
    simd.store(out, to + 7 * PANEL, e7)
    simd.store(out, to + 7 * PANEL + LANES, o7)


@compiled
def product(
    a: Floats, row: int, rows: int, pitch: int, panel: Floats, start: int, depth: int, out: Floats, to: int
) -> None:
    """out [rows, PANEL] for 1 … ROWS rows. May compute ROWS, and so reads a and writes out up to there."""
    if rows > ROWS // 3:
        product_rows(a, row, pitch, panel, start, depth, out, to)
    else:
        for i in range(rows):
            product_row(a, row + i * pitch, panel, start, depth, out, to + i * PANEL)


@compiled
def expand(first: int, last: int, head: int, shape: Shape, weights: Packed, work: Work, desk: Desk) -> None:
    """fired = relu(x · encoder) of tokens some tokens in one head, and lists of the pairs that fired, turned."""
    for token in range(last - first):
        desk.starts[token * (shape.panels + 1)] = 0
    for tile in range(first, last, MAX_TILE):
        tile_end = min(tile + MAX_TILE, last)
        for panel in range(shape.panels):
            columns = (head * shape.panels + panel) * shape.pitch * PANEL
            for token in range(tile, tile_end, ROWS):
                rows = min(ROWS, tile_end - token)
                row = token * shape.pitch
                product(work.inputs, row, rows, shape.pitch, weights.encoder, columns, shape.width, desk.products, 0)
                for i in range(rows):
                    record(token + i, token + i - first, panel, i * PANEL, shape, work, desk)


@inlined
def record(token: int, place: int, panel: int, at: int, shape: Shape, work: Work, desk: Desk) -> None:
    """Stores what fired, and appends the pairs that did, after RoPE, to the token's lists."""
    even, odd = simd.relu(simd.load(desk.products, at)), simd.relu(simd.load(desk.products, at + LANES))
    to = place * shape.fired_pitch + panel * PANEL
    simd.store(desk.fired, to, even)
    simd.store(desk.fired, to + LANES, odd)
    angles = token * shape.list_pitch + panel * LANES
    cos, sin = simd.load(work.cos, angles), simd.load(work.sin, angles)
    bits = simd.nonzero(even) | simd.nonzero(odd)
    cursor = place * (shape.panels + 1) + panel
    end = desk.starts[cursor]
    entry = place * shape.list_pitch + end
    simd.store_places(desk.pairs, entry, panel * LANES, bits)
    simd.store_chosen(desk.even, entry, simd.subtract(simd.multiply(even, cos), simd.multiply(odd, sin)), bits)
    simd.store_chosen(desk.odd, entry, simd.fma(odd, cos, simd.multiply(even, sin)), bits)
    desk.starts[cursor + 1] = end + simd.count_bits(bits)


@inlined
def fold_row(states: Floats, at: int, q: Any, x: Any, y: Any) -> Any:
    """One vector of one state row: returns y + q · S, and adds q ⊗ x to S."""
    row = simd.load(states, at)
    simd.store(states, at, simd.fma(q, x, row))
    return simd.fma(q, row, y)


@inlined
def fold_row_end(states: Floats, at: int, q: Any, x: Any, y: Any, count: int) -> Any:
    """As `fold_row`, of the last `count` lanes of a row."""
    row = simd.load_first(states, at, count)
    simd.store_first(states, at, simd.fma(q, x, row), count)
    return simd.fma(q, row, y)


@inlined
def fold_pair(states: Floats, at: int, width: int, work: Work, desk: Desk, entry: int, x: int, y: int) -> None:
    """The two state rows of one pair of neurons, at `at`: what the token reads of them, and what it writes."""
    q0, q1 = simd.spread(desk.even, entry), simd.spread(desk.odd, entry)
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        x_now, y_now = simd.load(work.x, x + i), simd.load(desk.y, y + i)
        y_now = fold_row(states, at + i, q0, x_now, y_now)
        simd.store(desk.y, y + i, fold_row(states, at + width + i, q1, x_now, y_now))
    rest = width - whole
    if rest:
        x_now, y_now = simd.load(work.x, x + whole), simd.load(desk.y, y + whole)
        y_now = fold_row_end(states, at + whole, q0, x_now, y_now, rest)
        simd.store(desk.y, y + whole, fold_row_end(states, at + width + whole, q1, x_now, y_now, rest))


@inlined
def fold_two_pairs(
    states: Floats,
    at: int,
    then: int,
    soon: int,
    later: int,
    width: int,
    work: Work,
    desk: Desk,
    entry: int,
    x: int,
    y: int,
) -> None:
    """As `fold_pair` of an entry and of the next one, but x and y move once. Prefetches `soon` and `later`, if ≥ 0."""
    q0, q1 = simd.spread(desk.even, entry), simd.spread(desk.odd, entry)
    q2, q3 = simd.spread(desk.even, entry + 1), simd.spread(desk.odd, entry + 1)
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        if soon >= 0:
            simd.prefetch(states, soon + i)
            simd.prefetch(states, soon + width + i)
            simd.prefetch(states, later + i)
            simd.prefetch(states, later + width + i)
        x_now, y_now = simd.load(work.x, x + i), simd.load(desk.y, y + i)
        y_now = fold_row(states, at + i, q0, x_now, y_now)
        y_now = fold_row(states, at + width + i, q1, x_now, y_now)
        y_now = fold_row(states, then + i, q2, x_now, y_now)
        simd.store(desk.y, y + i, fold_row(states, then + width + i, q3, x_now, y_now))
    rest = width - whole
    if rest:
        x_now, y_now = simd.load(work.x, x + whole), simd.load(desk.y, y + whole)
        y_now = fold_row_end(states, at + whole, q0, x_now, y_now, rest)
        y_now = fold_row_end(states, at + width + whole, q1, x_now, y_now, rest)
        y_now = fold_row_end(states, then + whole, q2, x_now, y_now, rest)
        simd.store(desk.y, y + whole, fold_row_end(states, then + width + whole, q3, x_now, y_now, rest))


@compiled
def attend_token(token: int, place: int, state: int, shape: Shape, states: Floats, work: Work, desk: Desk) -> None:
    """One pass over the rows of `states` from `state` on whose pair fired: y = q · S, then S += q ⊗ x.

    The token's lists and its y are those at `place` of the desk.
    """
    x, y = token * shape.pitch, place * shape.pitch
    for i in range(y, y + shape.pitch):
        desk.y[i] = 0
    size = 2 * shape.width
    first = place * shape.list_pitch
    last = first + desk.starts[place * (shape.panels + 1) + shape.panels]
    for entry in range(first, min(first + LOOKAHEAD, last)):
        at = state + desk.pairs[entry] * size
        for i in range(0, size, LANES):
            simd.prefetch(states, at + i)
    entry = first
    while entry + 1 < last:
        soon = state + desk.pairs[min(entry + LOOKAHEAD, last - 1)] * size
        later = state + desk.pairs[min(entry + LOOKAHEAD + 1, last - 1)] * size
        at, then = state + desk.pairs[entry] * size, state + desk.pairs[entry + 1] * size
        fold_two_pairs(states, at, then, soon, later, shape.width, work, desk, entry, x, y)
        entry += 2
    if entry < last:
        fold_pair(states, state + desk.pairs[entry] * size, shape.width, work, desk, entry, x, y)


@compiled
def attend_tokens(
    first: int, last: int, place: int, state: int, shape: Shape, states: Floats, work: Work, desk: Desk
) -> None:
    """As `attend_token` for each of one sequence's tokens, in their order, with the same bits.

    Goes panel by panel, whose state rows stay in the first cache for all the tokens.
    """
    for i in range(place * shape.pitch, (place + last - first) * shape.pitch):
        desk.y[i] = 0
    size = 2 * shape.width
    for panel in range(shape.panels):
        for token in range(first, last):
            row = place + token - first
            x, y = token * shape.pitch, row * shape.pitch
            entries, cursor = row * shape.list_pitch, row * (shape.panels + 1) + panel
            entry, end = entries + desk.starts[cursor], entries + desk.starts[cursor + 1]
            while entry + 1 < end:
                at, then = state + desk.pairs[entry] * size, state + desk.pairs[entry + 1] * size
                fold_two_pairs(states, at, then, -1, -1, shape.width, work, desk, entry, x, y)
                entry += 2
            if entry < end:
                fold_pair(states, state + desk.pairs[entry] * size, shape.width, work, desk, entry, x, y)


@compiled
def start_block(states: Floats, state: int, size: int, elements: int) -> None:
    """The oldest block leaves the window: S −= A, then A = S; A lies `size` elements behind S."""
    for i in range(state, state + elements):
        states[i] -= states[i + size]
        states[i + size] = states[i]


@compiled
def contract(first: int, last: int, head: int, shape: Shape, weights: Packed, work: Work, desk: Desk) -> None:
    """z = (fired ∘ relu(layer_norm(y) · encoder_v)) · decoder of some tokens in one head.

    The gates are a dense product: at the density of trained models that is faster than one of only what fired. Few of
    the products of both pass, and only their decoder rows are added.
    """
    for place in range(0, last - first, MAX_TILE):
        tokens = min(MAX_TILE, last - first - place)
        normalise(first + place, place, tokens, head, shape, work, desk)
        for block in range(0, shape.panels, PANELS):
            for i in range(tokens):
                desk.counts[i] = 0
            for panel in range(block, min(block + PANELS, shape.panels)):
                gate(place, tokens, head, panel, block, shape, weights, desk)
            for i in range(tokens):
                neurons = (head * shape.panels + block) * PANEL
                z = ((first + place + i) * shape.heads + head) * shape.pitch
                add_rows(i * PANELS * PANEL, desk.counts[i], neurons, z, shape, weights, work, desk)


@inlined
def normalise(first: int, place: int, tokens: int, head: int, shape: Shape, work: Work, desk: Desk) -> None:
    """A tile's y as the product takes it; its z back to zero."""
    for i in range(tokens):
        layer_norm(desk.y, (place + i) * shape.pitch, shape, desk.normed, i * shape.pitch)
        for k in range(shape.pitch):
            at = i * shape.pitch + k
            desk.normed[at] = rounded(desk.normed[at], shape.rounding)
            work.z[((first + i) * shape.heads + head) * shape.pitch + k] = 0


@inlined
def gate(place: int, tokens: int, head: int, panel: int, block: int, shape: Shape, weights: Packed, desk: Desk) -> None:
    """Appends to each token's list the neurons of a panel whose activation passes the gate, counted in the block."""
    columns = (head * shape.panels + panel) * shape.pitch * PANEL
    for i in range(0, tokens, ROWS):
        rows = min(ROWS, tokens - i)
        row = i * shape.pitch
        product(desk.normed, row, rows, shape.pitch, weights.encoder_v, columns, shape.width, desk.products, 0)
        for k in range(rows):
            for half in range(0, PANEL, LANES):
                fired = simd.load(desk.fired, (place + i + k) * shape.fired_pitch + panel * PANEL + half)
                gated = simd.multiply(fired, simd.relu(simd.load(desk.products, k * PANEL + half)))
                bits = simd.nonzero(gated)
                entry = (i + k) * PANELS * PANEL + desk.counts[i + k]
                simd.store_places(desk.passed, entry, (panel - block) * PANEL + half, bits)
                simd.store_chosen(desk.gated, entry, gated, bits)
                desk.counts[i + k] += simd.count_bits(bits)


@inlined
def add_rows(
    start: int, count: int, neurons: int, z: int, shape: Shape, weights: Packed, work: Work, desk: Desk
) -> None:
    """z += the decoder rows of a token's list, scaled; in the order of the list, whether by fours or one by one."""
    entry, end = start, start + count
    while entry + 3 < end:
        a = (neurons + desk.passed[entry]) * shape.pitch
        b = (neurons + desk.passed[entry + 1]) * shape.pitch
        c = (neurons + desk.passed[entry + 2]) * shape.pitch
        d = (neurons + desk.passed[entry + 3]) * shape.pitch
        by_a = simd.splat(rounded(desk.gated[entry], shape.rounding))
        by_b = simd.splat(rounded(desk.gated[entry + 1], shape.rounding))
        by_c = simd.splat(rounded(desk.gated[entry + 2], shape.rounding))
        by_d = simd.splat(rounded(desk.gated[entry + 3], shape.rounding))
        for k in range(0, shape.pitch, LANES):
            share = simd.fma(by_a, simd.load(weights.decoder, a + k), simd.load(work.z, z + k))
            share = simd.fma(by_b, simd.load(weights.decoder, b + k), share)
            share = simd.fma(by_c, simd.load(weights.decoder, c + k), share)
            simd.store(work.z, z + k, simd.fma(by_d, simd.load(weights.decoder, d + k), share))
        entry += 4
    while entry < end:
        a = (neurons + desk.passed[entry]) * shape.pitch
        by_a = simd.splat(rounded(desk.gated[entry], shape.rounding))
        for k in range(0, shape.pitch, LANES):
            simd.store(work.z, z + k, simd.fma(by_a, simd.load(weights.decoder, a + k), simd.load(work.z, z + k)))
        entry += 1


@compiled
def finish(token: int, shape: Shape, work: Work) -> None:
    """x = layer_norm(x + layer_norm(z)), z summed over the heads."""
    x, z = token * shape.pitch, token * shape.heads * shape.pitch
    for head in range(1, shape.heads):
        for i in range(shape.pitch):
            work.z[z + i] += work.z[z + head * shape.pitch + i]
    layer_norm(work.z, z, shape, work.z, z)
    for i in range(shape.pitch):
        work.x[x + i] += work.z[z + i]
    layer_norm(work.x, x, shape, work.x, x)
    set_inputs(token, shape, work)
