"""The compiled passes of a step on the CPU: what one thread does for one piece of a layer. `README.md` derives them.

Every sum is one chain of fused multiply-adds, or one tree, in an order that depends on the model alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bdh_batch.kernels import simd, simd_state, simd_terms as terms
from bdh_batch.kernels.cpu_layout import (
    BFLOAT16,
    FLOAT16,
    MAX_TILE,
    PANEL,
    PANELS,
    ROWS,
    Floats,
    Packed,
    Round,
    Scratch,
    Shape,
    Terms,
    Work,
)
from bdh_batch.kernels.vector import LANES, compiled, inlined

ALL_LANES = (1 << LANES) - 1


@inlined
def rounded(value: Any, rounding: int) -> Any:
    if rounding == FLOAT16:
        return simd.through_half(value)
    if rounding == BFLOAT16:
        return simd.through_bfloat(value)
    return value


@compiled
def layer_norm(source: Floats, start: int, shape: Shape, target: Floats, to: int) -> None:
    """One row; zeros behind its end. The order of its sums is spelt out: left to LLVM, it could differ by caller."""
    whole, none = shape.width // LANES * LANES, simd.splat(np.float32(0))
    ones, sums = simd.splat(np.float32(1)), none
    for i in range(0, whole, LANES):
        sums = simd.fma(ones, simd.load(source, start + i), sums)
    mean = simd.total(sums)
    for i in range(whole, shape.width):
        mean += source[start + i]
    mean /= np.float32(shape.width)
    means, squares = simd.splat(mean), none
    for i in range(0, whole, LANES):
        apart = simd.subtract(simd.load(source, start + i), means)
        squares = simd.fma(apart, apart, squares)
    variance = simd.total(squares)
    for i in range(whole, shape.width):
        variance += (source[start + i] - mean) ** 2
    scale = np.float32(1) / np.sqrt(variance / np.float32(shape.width) + np.float32(1e-5))
    for i in range(shape.width):
        target[to + i] = (source[start + i] - mean) * scale
    for i in range(shape.width, shape.pitch):
        target[to + i] = 0


@compiled
def set_inputs(token: int, shape: Shape, work: Work) -> None:
    """x as products take it, and as states of bfloat16 do."""
    x = token * shape.pitch
    twos = x + shape.width // PANEL * PANEL
    for i in range(x, twos, PANEL):
        simd_state.take_apart(work.x, i, work.x_apart, i)
    for i in range(twos, x + shape.pitch, LANES):
        simd.store(work.x_apart, i, simd.load(work.x, i))
    for i in range(x, x + shape.pitch, LANES):
        terms.store(work.inputs, i, rounded(simd.load(work.x, i), shape.rounding))


@compiled
def begin(token: int, part: Round, shape: Shape, weights: Packed, work: Work) -> None:
    """Looks a token up, or takes the vector of a latent step as it is, and sets its RoPE angles."""
    identity, x = part.tokens[token], token * shape.pitch
    if identity >= 0:
        layer_norm(weights.embed, identity * shape.pitch, shape, work.x, x)
    else:
        vector = (-1 - identity) * shape.width
        given = vector + shape.width <= len(part.vectors)  # else it shows, and reads nobody's memory
        for i in range(shape.width):
            value = part.vectors[vector + i] if given else np.float32(np.nan)
            work.x[x + i] = value if value == value else np.float32(np.nan)  # whose last bits are 0, as states need
        for i in range(shape.width, shape.pitch):
            work.x[x + i] = 0
    set_inputs(token, shape, work)
    set_angles(np.float64(part.positions[token]), weights.frequencies, token * shape.list_pitch, work)


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
def product_row(a: Terms, row: int, panel: Terms, start: int, depth: int, out: Floats, to: int) -> None:
    """out [PANEL] = a row of a · panel [depth, PANEL]."""
    even, odd = simd.splat(np.float32(0)), simd.splat(np.float32(0))
    for k in range(depth):
        a0 = terms.spread(a, row + k)
        even = terms.multiply_add(a0, terms.load(panel, start + k * PANEL), even)
        odd = terms.multiply_add(a0, terms.load(panel, start + k * PANEL + LANES), odd)
    simd.store(out, to, even)
    simd.store(out, to + LANES, odd)


@inlined
def product_rows(a: Terms, row: int, pitch: int, panel: Terms, start: int, depth: int, out: Floats, to: int) -> None:
    """out [ROWS, PANEL] = ROWS rows of a · panel [depth, PANEL]; the bits are those of `product_row`."""
    e0 = e1 = e2 = e3 = e4 = e5 = e6 = e7 = simd.splat(np.float32(0))
    o0 = o1 = o2 = o3 = o4 = o5 = o6 = o7 = simd.splat(np.float32(0))
    for k in range(depth):
        even, odd = terms.load(panel, start + k * PANEL), terms.load(panel, start + k * PANEL + LANES)
        at = row + k
        a0, a1 = terms.spread(a, at), terms.spread(a, at + pitch)
        e0, o0 = terms.multiply_add(a0, even, e0), terms.multiply_add(a0, odd, o0)
        e1, o1 = terms.multiply_add(a1, even, e1), terms.multiply_add(a1, odd, o1)
        a2, a3 = terms.spread(a, at + 2 * pitch), terms.spread(a, at + 3 * pitch)
        e2, o2 = terms.multiply_add(a2, even, e2), terms.multiply_add(a2, odd, o2)
        e3, o3 = terms.multiply_add(a3, even, e3), terms.multiply_add(a3, odd, o3)
        a4, a5 = terms.spread(a, at + 4 * pitch), terms.spread(a, at + 5 * pitch)
        e4, o4 = terms.multiply_add(a4, even, e4), terms.multiply_add(a4, odd, o4)
        e5, o5 = terms.multiply_add(a5, even, e5), terms.multiply_add(a5, odd, o5)
        a6, a7 = terms.spread(a, at + 6 * pitch), terms.spread(a, at + 7 * pitch)
        e6, o6 = terms.multiply_add(a6, even, e6), terms.multiply_add(a6, odd, o6)
        e7, o7 = terms.multiply_add(a7, even, e7), terms.multiply_add(a7, odd, o7)
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
    a: Terms, row: int, rows: int, pitch: int, panel: Terms, start: int, depth: int, out: Floats, to: int
) -> None:
    """out [rows, PANEL] for 1 … ROWS rows. May compute ROWS, and so reads a and writes out up to there."""
    if rows > ROWS // 3:
        product_rows(a, row, pitch, panel, start, depth, out, to)
    else:
        for i in range(rows):
            product_row(a, row + i * pitch, panel, start, depth, out, to + i * PANEL)


@inlined
def matrices_of(layer: int, head: int, shape: Shape) -> int:
    """Where the packed matrices of one head in a layer lie, counted in heads."""
    return layer % shape.sets * shape.heads + head


@compiled
def expand(
    first: int, last: int, layer: int, head: int, shape: Shape, weights: Packed, work: Work, scratch: Scratch
) -> None:
    """fired = relu(x · encoder) of tokens some tokens in one head, and lists of the pairs that fired, turned."""
    matrices, pitch = matrices_of(layer, head, shape), shape.input_pitch
    for token in range(last - first):
        scratch.starts[token * (shape.panels + 1)] = 0
    for tile in range(first, last, MAX_TILE):
        tile_end = min(tile + MAX_TILE, last)
        for panel in range(shape.panels):
            columns = (matrices * shape.panels + panel) * pitch * PANEL
            lanes = simd.first_bits(ALL_LANES, shape.neurons // 2 - panel * LANES)
            for token in range(tile, tile_end, ROWS):
                rows = min(ROWS, tile_end - token)
                row, products = token * pitch, scratch.products
                product(work.inputs, row, rows, pitch, weights.encoder, columns, shape.depth, products, 0)
                for i in range(rows):
                    record(token + i, token + i - first, panel, lanes, i * PANEL, layer, shape, work, scratch)


@inlined
def record(
    token: int, row: int, panel: int, lanes: int, at: int, layer: int, shape: Shape, work: Work, scratch: Scratch
) -> None:  # fmt: skip
    """Stores and counts what fired, and appends the pairs that did, after RoPE, to the token's lists.

    Only `lanes` are pairs of the model. In the others a NaN times zero is one too, but they have no rows in a state.
    """
    even, odd = simd.relu(simd.load(scratch.products, at)), simd.relu(simd.load(scratch.products, at + LANES))
    to = row * shape.fired_pitch + panel * PANEL
    simd.store(scratch.fired, to, even)
    simd.store(scratch.fired, to + LANES, odd)
    angles = token * shape.list_pitch + panel * LANES
    cos, sin = simd.load(work.cos, angles), simd.load(work.sin, angles)
    bits_even, bits_odd = simd.nonzero(even) & lanes, simd.nonzero(odd) & lanes
    bits = bits_even | bits_odd
    scratch.active[layer] += simd.count_bits(bits_even) + simd.count_bits(bits_odd)
    cursor = row * (shape.panels + 1) + panel
    end = scratch.starts[cursor]
    entry = row * shape.list_pitch + end
    simd.store_indices(scratch.pairs, entry, panel * LANES, bits)
    simd.store_chosen(scratch.even, entry, simd.subtract(simd.multiply(even, cos), simd.multiply(odd, sin)), bits)
    simd.store_chosen(scratch.odd, entry, simd.fma(odd, cos, simd.multiply(even, sin)), bits)
    scratch.starts[cursor + 1] = end + simd.count_bits(bits)


@compiled
def show(first: int, last: int, layer: int, head: int, part: Round, shape: Shape, scratch: Scratch) -> None:
    """Copies what the watched ones of some tokens fired in one head, in the checkpoint's order of neurons."""
    whole = shape.neurons // PANEL * PANEL
    for i in range(len(part.watched)):
        if first <= part.watched[i] < last:
            row = (part.watched[i] - first) * shape.fired_pitch
            to = layer * part.shown_pitch + (i * shape.heads + head) * shape.neurons
            for at in range(0, whole, PANEL):
                even, odd = simd.load(scratch.fired, row + at), simd.load(scratch.fired, row + at + LANES)
                simd.store_pairs(part.shown, to + at, even, odd)
            for pair in range((shape.neurons - whole) // 2):
                part.shown[to + whole + 2 * pair] = scratch.fired[row + whole + pair]
                part.shown[to + whole + 2 * pair + 1] = scratch.fired[row + whole + LANES + pair]


@compiled
def contract(
    first: int, last: int, layer: int, head: int, shape: Shape, weights: Packed, work: Work, scratch: Scratch
) -> None:
    """z = (fired ∘ relu(layer_norm(y) · encoder_v)) · decoder of some tokens in one head.

    A gate is computed only for what fired, and only decoder rows that passed theirs are added.
    """
    matrices = matrices_of(layer, head, shape)
    for row in range(0, last - first, MAX_TILE):
        tokens = min(MAX_TILE, last - first - row)
        normalise(first + row, row, tokens, head, shape, work, scratch)
        for block in range(0, shape.panels, PANELS):
            neurons = (matrices * shape.panels + block) * PANEL
            for i in range(tokens):
                count = list_fired(row + i, block, shape, scratch)
                gate(i * shape.input_pitch, count, neurons, shape, weights, scratch)
                passed = keep_passed(count, scratch)
                z = ((first + row + i) * shape.heads + head) * shape.pitch
                add_rows(passed, neurons, z, shape, weights, work, scratch)


@inlined
def normalise(first: int, row: int, tokens: int, head: int, shape: Shape, work: Work, scratch: Scratch) -> None:
    """A tile's y as the gates take it; its z back to zero."""
    for i in range(tokens):
        y, z = (row + i) * shape.pitch, ((first + i) * shape.heads + head) * shape.pitch
        layer_norm(scratch.y, y, shape, scratch.y, y)
        for k in range(0, shape.pitch, LANES):
            normed = rounded(simd.load(scratch.y, y + k), shape.rounding)
            terms.store(scratch.normed, i * shape.pitch + k, normed)
            simd.store(work.z, z + k, simd.splat(np.float32(0)))


@inlined
def list_fired(row: int, block: int, shape: Shape, scratch: Scratch) -> Any:
    """Lists a token's neurons that fired in a block of panels, counted from the block's first; returns how many."""
    count = 0
    start = row * shape.fired_pitch
    for at in range(block * PANEL, min(block + PANELS, shape.panels) * PANEL, LANES):
        fired = simd.load(scratch.fired, start + at)
        bits = simd.nonzero(fired)
        simd.store_indices(scratch.neurons, count, at - block * PANEL, bits)
        simd.store_chosen(scratch.gated, count, fired, bits)
        count += simd.count_bits(bits)
    return count


@inlined
def gate(y: int, count: int, neurons: int, shape: Shape, weights: Packed, scratch: Scratch) -> None:
    """The gates, before their relu, of the neurons listed: each a dot product, by fours."""
    for entry in range(0, count, 4):
        last = count - 1
        a = (neurons + scratch.neurons[entry]) * shape.input_pitch
        b = (neurons + scratch.neurons[min(entry + 1, last)]) * shape.input_pitch
        c = (neurons + scratch.neurons[min(entry + 2, last)]) * shape.input_pitch
        d = (neurons + scratch.neurons[min(entry + 3, last)]) * shape.input_pitch
        by_a = by_b = by_c = by_d = simd.splat(np.float32(0))
        for k in range(0, shape.input_pitch, LANES):
            normed = terms.load(scratch.normed, y + k)
            by_a = terms.multiply_add(normed, terms.load(weights.encoder_v, a + k), by_a)
            by_b = terms.multiply_add(normed, terms.load(weights.encoder_v, b + k), by_b)
            by_c = terms.multiply_add(normed, terms.load(weights.encoder_v, c + k), by_c)
            by_d = terms.multiply_add(normed, terms.load(weights.encoder_v, d + k), by_d)
        simd.store(scratch.gates, entry, simd.sums(by_a, by_b, by_c, by_d))


@inlined
def keep_passed(count: int, scratch: Scratch) -> Any:
    """Multiplies what is listed with its gates, and keeps in the list what is left; returns how many."""
    passed = 0
    for entry in range(0, count, LANES):
        gated = simd.multiply(simd.load(scratch.gated, entry), simd.relu(simd.load(scratch.gates, entry)))
        bits = simd.first_bits(simd.nonzero(gated), count - entry)
        simd.move_chosen(scratch.neurons, passed, entry, bits)
        simd.store_chosen(scratch.gated, passed, gated, bits)
        passed += simd.count_bits(bits)
    return passed


@inlined
def add_rows(count: int, neurons: int, z: int, shape: Shape, weights: Packed, work: Work, scratch: Scratch) -> None:
    """z += the decoder rows of the neurons listed, scaled; in their order, whether by fours or one by one."""
    entry, end = 0, count
    while entry + 3 < end:
        a = (neurons + scratch.neurons[entry]) * shape.pitch
        b = (neurons + scratch.neurons[entry + 1]) * shape.pitch
        c = (neurons + scratch.neurons[entry + 2]) * shape.pitch
        d = (neurons + scratch.neurons[entry + 3]) * shape.pitch
        by_a = simd.splat(rounded(scratch.gated[entry], shape.rounding))
        by_b = simd.splat(rounded(scratch.gated[entry + 1], shape.rounding))
        by_c = simd.splat(rounded(scratch.gated[entry + 2], shape.rounding))
        by_d = simd.splat(rounded(scratch.gated[entry + 3], shape.rounding))
        for k in range(0, shape.pitch, LANES):
            share = simd.fma(by_a, terms.load_wide(weights.decoder, a + k), simd.load(work.z, z + k))
            share = simd.fma(by_b, terms.load_wide(weights.decoder, b + k), share)
            share = simd.fma(by_c, terms.load_wide(weights.decoder, c + k), share)
            simd.store(work.z, z + k, simd.fma(by_d, terms.load_wide(weights.decoder, d + k), share))
        entry += 4
    while entry < end:
        a = (neurons + scratch.neurons[entry]) * shape.pitch
        by_a = simd.splat(rounded(scratch.gated[entry], shape.rounding))
        for k in range(0, shape.pitch, LANES):
            simd.store(work.z, z + k, simd.fma(by_a, terms.load_wide(weights.decoder, a + k), simd.load(work.z, z + k)))
        entry += 1


@compiled
def finish(token: int, layer: int, shape: Shape, work: Work) -> None:
    """x = layer_norm(x + layer_norm(z)), z summed over the heads; the outer one perhaps in the last layer alone."""
    x, z = token * shape.pitch, token * shape.heads * shape.pitch
    for head in range(1, shape.heads):
        for i in range(shape.pitch):
            work.z[z + i] += work.z[z + head * shape.pitch + i]
    layer_norm(work.z, z, shape, work.z, z)
    for i in range(shape.pitch):
        work.x[x + i] += work.z[z + i]
    if not shape.final_norm or layer == shape.layers - 1:
        layer_norm(work.x, x, shape, work.x, x)
    set_inputs(token, shape, work)
