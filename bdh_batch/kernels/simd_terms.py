"""What products multiply: float32 numbers, or bfloat16 in pairs, which processors with avx512_bf16 multiply as such.

A float32 array holds a term in each element. A uint32 array holds two, side by side in memory, in each. The same loop
serves both: an index counts elements, and an array's dtype decides what its vectors are, `VECTOR` or `PAIRS`.
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


def multiplies_pairs() -> bool:
    """Whether the processor that functions are compiled for has avx512_bf16: multiplies pairs of bfloat16."""
    return "+avx512bf16" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


@intrinsic
def load(context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16]"""
    kind, llvm = (VECTOR, FLOATS) if array.dtype == types.float32 else (PAIRS, INTS)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], llvm)
        return builder.load(pointer, align=4)

    return kind(array, types.int64), generate


@intrinsic
def spread(context: Any, array: Any, index: Any) -> Any:
    """array[index] in every lane."""
    kind, llvm = (VECTOR, FLOATS.element) if array.dtype == types.float32 else (PAIRS, INT)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], llvm)
        return broadcast(builder, builder.load(pointer))

    return kind(array, types.int64), generate


@intrinsic
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, c of float32. Of pairs both products are added to it, in the order and rounding of `vdpbf16ps`, which
    takes subnormal numbers for 0."""
    pairs = a == PAIRS

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not pairs:
            return builder.call(declare(builder, "llvm.fma.v16f32", FLOATS, [FLOATS] * 3), args)
        function = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, _PAIRS, _PAIRS])
        factors = [builder.bitcast(factor, _PAIRS) for factor in args[:2]]
        return builder.call(function, [args[2], *factors])

    return VECTOR(a, a, VECTOR) if a == b else None, generate


@intrinsic
def store(context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Stores sixteen terms from the array's `index`th term on; as bfloat16 they are rounded to the nearest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype == types.float32:
            pointer = address(context, builder, signature.args[0], args[0], args[1], FLOATS)
            builder.store(args[2], pointer, align=4)
        else:
            function = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", _BFLOATS, [FLOATS])
            pointer = _of_halves(context, builder, signature, args)
            builder.store(builder.bitcast(builder.call(function, [args[2]]), HALVES), pointer, align=2)
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR), generate


@intrinsic
def load_wide(context: Any, array: Any, index: Any) -> Any:
    """The sixteen terms from the array's `index`th term on, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype == types.float32:
            return builder.load(address(context, builder, signature.args[0], args[0], args[1], FLOATS), align=4)
        halves = builder.load(_of_halves(context, builder, signature, args), align=2)
        bits = builder.shl(builder.zext(halves, INTS), ir.Constant(INTS, [16] * LANES))
        return builder.bitcast(bits, FLOATS)

    return VECTOR(array, types.int64), generate


def _of_halves(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """A pointer to the bfloat16 that args[1] counts, sixteen of them, in an array of words."""
    zero = ir.Constant(args[1].type, 0)
    start = address(context, builder, signature.args[0], args[0], zero, ir.IntType(16))
    return builder.bitcast(builder.gep(start, [args[1]]), HALVES.as_pointer())
