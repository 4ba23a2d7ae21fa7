"""The compiled passes of a step on the CPU: what one thread does for one piece of a layer. `README.md` derives them.

Every sum is one chain of fused multiply-adds, or one tree, in an order that depends on the model alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bdh_batch.kernels import simd, simd_state, simd_terms as terms
from bdh_batch.kernels.cpu_layout import (
    INTEGERS,
    MAX_TILE,
    PANEL,
    PANELS,
    ROWS,
    Floats,
    Packed,
    Round,
    Scratch,
    Shape,
    Work,
)
from bdh_batch.kernels.cpu_products import product, rounded, scale_panel, store_row
from bdh_batch.kernels.vector import LANES, compiled, inlined

ALL_LANES = (1 << LANES) - 1


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
    work.scales[token] = store_row(work.x, x, shape, work.inputs, x)


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
            neuron = (matrices * shape.panels + panel) * PANEL
            columns = neuron * pitch
            lanes = simd.first_bits(ALL_LANES, shape.neurons // 2 - panel * LANES)
            for token in range(tile, tile_end, ROWS):
                rows = min(ROWS, tile_end - token)
                row, products = token * pitch, scratch.products
                product(work.inputs, row, rows, pitch, weights.encoder, columns, shape.depth, products, 0)
                for i in range(rows):
                    if shape.rounding == INTEGERS:
                        scale_panel(scratch.products, i * PANEL, work.scales[token + i], weights.encoder_scales, neuron)
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
                gate(i, count, neurons, shape, weights, scratch)
                passed = keep_passed(count, scratch)
                if shape.rounding == INTEGERS:
                    scale_passed(passed, weights.gated_scales, neurons, scratch)
                z = ((first + row + i) * shape.heads + head) * shape.pitch
                add_rows(passed, neurons, z, shape, weights, work, scratch)


@inlined
def normalise(first: int, row: int, tokens: int, head: int, shape: Shape, work: Work, scratch: Scratch) -> None:
    """A tile's y as the gates take it; its z back to zero."""
    for i in range(tokens):
        y, z = (row + i) * shape.pitch, ((first + i) * shape.heads + head) * shape.pitch
        layer_norm(scratch.y, y, shape, scratch.y, y)
        scratch.normed_scales[i] = store_row(scratch.y, y, shape, scratch.normed, i * shape.pitch)
        for k in range(z, z + shape.pitch, LANES):
            simd.store(work.z, k, simd.splat(np.float32(0)))


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
def gate(row: int, count: int, neurons: int, shape: Shape, weights: Packed, scratch: Scratch) -> None:
    """The gates, before their relu, of the neurons listed: each a dot product, by fours. Those of int8 lack the scale
    of their weights."""
    y = row * shape.input_pitch
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
        by_a, by_b = terms.total(weights.encoder_v, by_a), terms.total(weights.encoder_v, by_b)
        by_c, by_d = terms.total(weights.encoder_v, by_c), terms.total(weights.encoder_v, by_d)
        gates = simd.sums(by_a, by_b, by_c, by_d)
        if shape.rounding == INTEGERS:
            gates = simd.multiply(gates, simd.splat(scratch.normed_scales[row]))
        simd.store(scratch.gates, entry, gates)


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
def scale_passed(count: int, scales: Floats, neurons: int, scratch: Scratch) -> None:
    """What is listed, times what its weights in encoder_v and in the decoder are multiples of."""
    for entry in range(count):
        scratch.gated[entry] *= scales[neurons + scratch.neurons[entry]]


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
