"""Products of some rows of inputs with a panel of weights, the same for all that `simd_terms.py` knows.

Every sum is one chain of fused multiply-adds, or of integers, in an order that depends on the model alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bdh_batch.kernels import simd, simd_terms as terms
from bdh_batch.kernels.cpu_layout import BFLOAT16, FLOAT16, INTEGERS, PANEL, ROWS, Floats, Shape, Terms
from bdh_batch.kernels.vector import LANES, compiled, inlined


@inlined
def rounded(value: Any, rounding: int) -> Any:
    if rounding == FLOAT16:
        return simd.through_half(value)
    if rounding == BFLOAT16:
        return simd.through_bfloat(value)
    return value


@inlined
def store_row(source: Floats, start: int, shape: Shape, target: Terms, to: int) -> Any:
    """A row as products take it. Returns what it is multiples of: as integers, its largest number has most of their
    bits; NaN and infinity make all of it NaN."""
    scale, inverse = np.float32(1), np.float32(1)
    if shape.rounding == INTEGERS:
        sizes = simd.splat(np.float32(0))
        for i in range(0, shape.pitch, LANES):
            sizes = simd.larger(sizes, simd.load(source, start + i))
        largest = simd.largest(sizes)
        scale = largest / np.float32(shape.largest_input)
        inverse = np.float32(shape.largest_input) / largest if largest > 0 else np.float32(0)
    for i in range(0, shape.pitch, LANES):
        value = rounded(simd.load(source, start + i), shape.rounding)
        terms.store(target, to + i, value, simd.splat(inverse))
    return scale


@inlined
def product_row(a: Terms, row: int, panel: Terms, start: int, depth: int, out: Floats, to: int) -> None:
    """out [PANEL] = a row of a · panel [depth, PANEL]."""
    even, odd = simd.splat(np.float32(0)), simd.splat(np.float32(0))
    for k in range(depth):
        a0 = terms.spread(a, row + k)
        even = terms.multiply_add(a0, terms.load(panel, start + k * PANEL), even)
        odd = terms.multiply_add(a0, terms.load(panel, start + k * PANEL + LANES), odd)
    simd.store(out, to, terms.total(panel, even))
    simd.store(out, to + LANES, terms.total(panel, odd))


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
    simd.store(out, to + 0 * PANEL, terms.total(panel, e0))
    simd.store(out, to + 0 * PANEL + LANES, terms.total(panel, o0))
    simd.store(out, to + 1 * PANEL, terms.total(panel, e1))
    simd.store(out, to + 1 * PANEL + LANES, terms.total(panel, o1))
    simd.store(out, to + 2 * PANEL, terms.total(panel, e2))
    simd.store(out, to + 2 * PANEL + LANES, terms.total(panel, o2))
    simd.store(out, to + 3 * PANEL, terms.total(panel, e3))
    simd.store(out, to + 3 * PANEL + LANES, terms.total(panel, o3))
    simd.store(out, to + 4 * PANEL, terms.total(panel, e4))
    simd.store(out, to + 4 * PANEL + LANES, terms.total(panel, o4))
    simd.store(out, to + 5 * PANEL, terms.total(panel, e5))
    simd.store(out, to + 5 * PANEL + LANES, terms.total(panel, o5))
    simd.store(out, to + 6 * PANEL, terms.total(panel, e6))
    simd.store(out, to + 6 * PANEL + LANES, terms.total(panel, o6))
    simd.store(out, to + 7 * PANEL, terms.total(panel, e7))
    simd.store(out, to + 7 * PANEL + LANES, terms.total(panel, o7))


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
def scale_panel(products: Floats, at: int, scale: Any, scales: Floats, column: int) -> None:
    """Sums of integers in a panel, which begins with a column, times what its row and its columns are multiples of."""
    for i in range(0, PANEL, LANES):
        of_both = simd.multiply(simd.splat(scale), simd.load(scales, column + i))
        simd.store(products, at + i, simd.multiply(simd.load(products, at + i), of_both))
