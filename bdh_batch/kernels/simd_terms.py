"""What products multiply: float32 numbers, or pairs of bfloat16 or of integers, which take half the instructions.

An array's dtype tells what its elements are. The same loop serves all: an index counts elements.

| dtype | an element | multiplied |
|---|---|---|
| float32 | a term | as float32 |
| uint32 | two of bfloat16 side by side | by processors with avx512_bf16 |
| int32 | two int16: a row of inputs, rounded to multiples of its own scale | with the next kind, exactly |
| uint16 | two int8: weights, widened to int16 as they are loaded | |
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target

from bdh_batch.kernels.vector import (
    FLOATS,
    HALVES,
    INT,
    INTS,
    LANES,
    PAIRS,
    SHORTS,
    VECTOR,
    address,
    broadcast,
    declare,
    intrinsic,
)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOATS = ir.VectorType(_BFloat(), LANES)
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_CHARS, _CHAR_PAIRS = (ir.VectorType(ir.IntType(8), count * LANES) for count in (1, 2))
_WHOLE = 1.5 * 2**23  # added to a number of at most 2²², it leaves the nearest integer in the last bits
INPUTS = {types.float32: VECTOR, types.uint32: PAIRS, types.int32: SHORTS}
WEIGHTS = {types.float32: VECTOR, types.uint32: PAIRS, types.uint16: SHORTS}


def multiplies_pairs() -> bool:
    """Whether the processor that functions are compiled for has avx512_bf16: multiplies pairs of bfloat16."""
    return has("avx512bf16")


def has(feature: str) -> bool:
    """Whether the processor that functions are compiled for has a feature, by LLVM's name."""
    return f"+{feature}" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


@intrinsic
def load(context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16], of inputs or weights."""
    kind = (INPUTS | WEIGHTS)[array.dtype]
    llvm = {types.float32: FLOATS, types.uint16: _CHAR_PAIRS}.get(array.dtype, INTS)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], llvm)
        loaded = builder.load(pointer, align=2 if llvm == _CHAR_PAIRS else 4)
        return builder.bitcast(builder.sext(loaded, _SHORTS), INTS) if llvm == _CHAR_PAIRS else loaded

    return kind(array, types.int64), generate


@intrinsic
def spread(context: Any, array: Any, index: Any) -> Any:
    """array[index] in every lane, of inputs."""
    llvm = FLOATS.element if array.dtype == types.float32 else INT

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], llvm)
        return broadcast(builder, builder.load(pointer))

    return INPUTS[array.dtype](array, types.int64), generate


@intrinsic
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c. Of pairs both products are added to it: those of bfloat16 in the order and rounding of `vdpbf16ps`,
    which takes subnormal numbers for 0; those of integers as such, in c's bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if a == VECTOR:
            return builder.call(declare(builder, "llvm.fma.v16f32", FLOATS, [FLOATS] * 3), args)
        if a == SHORTS:
            sums = builder.add(_products(builder, *args[:2]), builder.bitcast(args[2], INTS))
            return builder.bitcast(sums, FLOATS)
        function = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, _PAIRS, _PAIRS])
        factors = [builder.bitcast(factor, _PAIRS) for factor in args[:2]]
        return builder.call(function, [args[2], *factors])

    return VECTOR(a, a, VECTOR) if a == b else None, generate


def _products(builder: Any, a: Any, b: Any) -> Any:
    """The sums of two products of int16 in each lane, by one instruction where there is one."""
    if has("avx512bw"):
        function = declare(builder, "llvm.x86.avx512.pmaddw.d.512", INTS, [_SHORTS, _SHORTS])
        return builder.call(function, [builder.bitcast(each, _SHORTS) for each in (a, b)])
    half = ir.Constant(INTS, [16] * LANES)
    low = (builder.ashr(builder.shl(each, half), half) for each in (a, b))
    high = (builder.ashr(each, half) for each in (a, b))
    return builder.add(builder.mul(*low), builder.mul(*high))


@intrinsic
def total(context: Any, weights: Any, sums: Any) -> Any:
    """What `multiply_add` has added up of `weights`, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype != types.uint16:
            return args[1]
        return builder.sitofp(builder.bitcast(args[1], INTS), FLOATS)

    return VECTOR(weights, VECTOR), generate


@intrinsic
def store(context: Any, array: Any, index: Any, vector: Any, inverse: Any) -> Any:
    """Stores sixteen terms from the array's `index`th term on. As bfloat16 they are rounded to the nearest, as integers
    after they were multiplied by `inverse`, which leaves at most 2¹⁵."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, vector, inverse = args
        dtype = signature.args[0].dtype
        if dtype == types.float32:
            pointer = address(context, builder, signature.args[0], array, index, FLOATS)
            builder.store(vector, pointer, align=4)
            return context.get_dummy_value()
        if dtype == types.uint32:
            function = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _BFLOATS, [FLOATS])
            halves = builder.bitcast(builder.call(function, [vector]), HALVES)
        else:
            function = declare(builder, "llvm.fma.v16f32", FLOATS, [FLOATS] * 3)
            whole = builder.call(function, [vector, inverse, ir.Constant(FLOATS, [_WHOLE] * LANES)])
            halves = builder.trunc(builder.bitcast(whole, INTS), HALVES)
        builder.store(halves, _terms(context, builder, signature, args, HALVES), align=2)
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR, VECTOR), generate


@intrinsic
def load_wide(context: Any, array: Any, index: Any) -> Any:
    """The sixteen weights from the array's `index`th on, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dtype = signature.args[0].dtype
        if dtype == types.float32:
            return builder.load(address(context, builder, signature.args[0], args[0], args[1], FLOATS), align=4)
        if dtype == types.uint16:
            chars = builder.load(_terms(context, builder, signature, args, _CHARS), align=1)
            return builder.sitofp(builder.sext(chars, INTS), FLOATS)
        halves = builder.load(_terms(context, builder, signature, args, HALVES), align=2)
        bits = builder.shl(builder.zext(halves, INTS), ir.Constant(INTS, [16] * LANES))
        return builder.bitcast(bits, FLOATS)

    return VECTOR(array, types.int64), generate


def _terms(context: Any, builder: Any, signature: Any, args: Any, llvm: Any) -> Any:
    """A pointer to the sixteen terms that args[1] counts, in an array of pairs."""
    zero = ir.Constant(args[1].type, 0)
    start = address(context, builder, signature.args[0], args[0], zero, llvm.element)
    return builder.bitcast(builder.gep(start, [args[1]]), llvm.as_pointer())
