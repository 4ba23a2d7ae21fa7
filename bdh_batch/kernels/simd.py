"""Operations on sixteen float32 side by side: what the compiler must not be left to guess in the inner loops.

Every operation rounds as its name says and in one order, so a sum has the same bits wherever it is compiled into.
Arrays are flat and contiguous, addressed by int64 indices of elements; nothing checks bounds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from bdh_batch.kernels.vector import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    MASK,
    VECTOR,
    address,
    broadcast,
    declare,
    inlined,
    intrinsic,
    shuffle,
)


@intrinsic
def load(context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16]"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], FLOATS)
        return builder.load(pointer, align=4)

    return VECTOR(array, types.int64), generate


@intrinsic
def store(context: Any, array: Any, index: Any, vector: Any) -> Any:
    """array[index : index + 16] = vector"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], FLOATS)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR), generate


@intrinsic
def splat(context: Any, value: Any) -> Any:
    """`value` in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return broadcast(builder, args[0])

    return VECTOR(types.float32), generate


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(declare(builder, "llvm.fma.v16f32", FLOATS, [FLOATS] * 3), args)

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


@intrinsic
def multiply(context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def subtract(context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(*args)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def relu(context: Any, vector: Any) -> Any:
    """max(vector, 0); NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zeros = ir.Constant(FLOATS, [0.0] * LANES)
        return builder.select(builder.fcmp_unordered(">", args[0], zeros), args[0], zeros)

    return VECTOR(VECTOR), generate


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """max(a, |b|); NaN where one of them is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = builder.call(declare(builder, "llvm.fabs.v16f32", FLOATS, [FLOATS]), [args[1]])
        return builder.call(declare(builder, "llvm.maximum.v16f32", FLOATS, [FLOATS] * 2), [args[0], size])

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def largest(context: Any, vector: Any) -> Any:
    """The largest of the lanes; NaN where one of them is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (vector,) = args
        maximum = declare(builder, "llvm.maximum.v16f32", FLOATS, [FLOATS] * 2)
        for half in (8, 4, 2, 1):
            turned = shuffle(builder, vector, vector, [(lane + half) % LANES for lane in range(LANES)])
            vector = builder.call(maximum, [vector, turned])
        return builder.extract_element(vector, ir.Constant(INT, 0))

    return types.float32(VECTOR), generate


@intrinsic
def nonzero(context: Any, vector: Any) -> Any:
    """An integer with bit i set where lane i is not zero (NaN is not)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.fcmp_unordered("!=", args[0], ir.Constant(FLOATS, [0.0] * LANES))
        return builder.zext(builder.bitcast(bits, ir.IntType(16)), ir.IntType(64))

    return types.int64(VECTOR), generate


@inlined
def first_bits(bits: int, count: int) -> int:
    """`bits` without those from `count` on, if that is under 16."""
    return bits & ((1 << min(count, LANES)) - 1)


@intrinsic
def count_bits(context: Any, bits: Any) -> Any:
    """How many bits of `bits` are set."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), generate


@intrinsic
def store_chosen(context: Any, array: Any, index: Any, vector: Any, bits: Any) -> Any:
    """Stores the lanes whose bit is set, side by side, from array[index] on, and anything in the rest of the 16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], FLOATS)
        builder.store(_chosen(builder, args[2], args[3]), pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR, types.int64), generate


@intrinsic
def store_indices(context: Any, array: Any, index: Any, base: Any, bits: Any) -> Any:
    """As `store_chosen`, but stores `base` + the lane's number, in an int32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.Constant(INTS, list(range(LANES)))
        indices = builder.add(lanes, broadcast(builder, builder.trunc(args[2], INT)))
        pointer = address(context, builder, signature.args[0], args[0], args[1], INTS)
        builder.store(_chosen(builder, indices, args[3]), pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64, types.int64), generate


@intrinsic
def store_pairs(context: Any, array: Any, index: Any, even: Any, odd: Any) -> Any:
    """array[index : index + 32] = the lanes of `even` and `odd` by turns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for half in (0, LANES):
            turns = [half // 2 + lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
            at = builder.add(args[1], ir.Constant(args[1].type, half))
            pointer = address(context, builder, signature.args[0], args[0], at, FLOATS)
            builder.store(shuffle(builder, args[2], args[3], turns), pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR, VECTOR), generate


@intrinsic
def move_chosen(context: Any, array: Any, index: Any, source: Any, bits: Any) -> Any:
    """As `store_chosen`, but of array[source : source + 16], in an int32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [address(context, builder, signature.args[0], args[0], args[at], INTS) for at in (1, 2)]
        vector = builder.load(pointers[1], align=4)
        builder.store(_chosen(builder, vector, args[3]), pointers[0], align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64, types.int64), generate


def _chosen(builder: Any, vector: Any, bits: Any) -> Any:
    mask = builder.bitcast(builder.trunc(bits, ir.IntType(16)), MASK)
    name = "f32" if vector.type == FLOATS else "i32"
    function = declare(
        builder, f"llvm.experimental.vector.compress.v16{name}", vector.type, [vector.type, MASK, vector.type]
    )
    return builder.call(function, [vector, mask, ir.Constant(vector.type, ir.Undefined)])


@intrinsic
def sums(context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """A vector that starts with the sums of the lanes of a, b, c and d; each is added up as the same binary tree."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def fold(p: Any, q: Any, low: list[int], high: list[int]) -> Any:
            return builder.fadd(shuffle(builder, p, q, low), shuffle(builder, p, q, high))

        halves = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
        quarters = [n + 8 * block for block in range(4) for n in range(4)]
        ab, cd = fold(args[0], args[1], *halves), fold(args[2], args[3], *halves)
        abcd = fold(ab, cd, quarters, [n + 4 for n in quarters])
        pairs = [4 * block + n % 2 for block in range(4) for n in range(4)]
        abcd = fold(abcd, abcd, pairs, [n + 2 for n in pairs])
        firsts = [4 * (n % 4) for n in range(LANES)]
        return fold(abcd, abcd, firsts, [n + 1 for n in firsts])

    return VECTOR(VECTOR, VECTOR, VECTOR, VECTOR), generate


@intrinsic
def total(context: Any, vector: Any) -> Any:
    """The sum of the lanes, added up as a binary tree."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (vector,) = args
        for half in (8, 4, 2, 1):
            turned = shuffle(builder, vector, vector, [(lane + half) % LANES for lane in range(LANES)])
            vector = builder.fadd(vector, turned)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(VECTOR), generate


@intrinsic
def through_half(context: Any, value: Any) -> Any:
    """A number or a vector rounded to float16 and back."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = args[0].type
        narrow = ir.HalfType() if wide == FLOAT else ir.VectorType(ir.HalfType(), LANES)
        return builder.fpext(builder.fptrunc(args[0], narrow), wide)

    return value(value), generate


@intrinsic
def through_bfloat(context: Any, value: Any) -> Any:
    """A number or a vector rounded to bfloat16, ties to even, and back. NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = args[0].type
        integers = INT if wide == FLOAT else INTS

        def constant(number: int) -> Any:
            return ir.Constant(integers, number if wide == FLOAT else [number] * LANES)

        bits = builder.bitcast(args[0], integers)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
        kept = builder.bitcast(builder.and_(rounded, constant(0xFFFF0000)), wide)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), args[0], kept)

    return value(value), generate
