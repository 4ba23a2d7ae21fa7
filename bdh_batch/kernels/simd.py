"""Sixteen float32 side by side, for Numba: what the compiler must not be left to guess in the inner loops.

A `Vector` is a value that lives in registers; LLVM splits it where the machine's are narrower. Every operation rounds
as its name says and in one order, so a sum has the same bits wherever it is compiled into. Arrays are flat and
contiguous, addressed by int64 indices of elements; nothing checks bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic as _intrinsic, models, register_model

from bdh_batch.kernels.cache import keep_compiled

LANES = 16

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_BYTES = ir.IntType(8).as_pointer()
_QUIET = 0x00400000  # the bit of a NaN that keeps it one without its last 16
_GOLDEN = 0x9E3779B1  # 2³² / the golden ratio, odd: its multiples spread evenly

Vector = Any  # sixteen float32 in registers
Function = TypeVar("Function", bound=Callable[..., Any])


# Numba keeps what it compiled until the file of that very function changes. These functions are compiled into one
# another across files, so a change in any of them must count.
SOURCES = tuple(
    (file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(Path(__file__).parent.glob("*.py"))
)


def _compiler(**options: Any) -> Callable[[Function], Function]:
    """`_nrt`: arrays are borrowed, never counted; counting them took more time than the loops."""

    def compile_lazily(function: Function) -> Function:
        dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
        keep_compiled(dispatcher, SOURCES)
        return cast(Function, dispatcher)

    return compile_lazily


compiled = _compiler(_nrt=False)  # on the first call, and kept on disk; runs without the GIL
inlined = _compiler(_nrt=False, forceinline=True)  # and copied into its callers
in_parallel = _compiler(parallel=True)  # `prange` loops on several threads


def most_threads() -> int:
    """Threads that a `prange` loop can have."""
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], _intrinsic(function))


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


_VECTOR: Any = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)  # type: ignore[no-untyped-call]


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, pointee: ir.Type) -> Any:
    """A pointer to `pointee` at an array's element."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _masked(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    lanes = ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(count, _INT)))


def _spread(builder: Any, value: Any) -> Any:
    """A vector with `value` in every lane."""
    vector_type = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, ir.Constant(_INT, 0))
    return _shuffle(builder, first, first, [0] * LANES)


def _shuffle(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    """Lanes of `a` (0 … 15) and `b` (16 … 31)."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, LANES), picks))


def _declare(builder: Any, name: str, result: ir.Type, arguments: list[ir.Type]) -> Any:
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name=name)


_MASK = ir.VectorType(ir.IntType(1), LANES)


@intrinsic
def load(context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16]"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1], _FLOATS)
        return builder.load(pointer, align=4)

    return _VECTOR(array, types.int64), generate


@intrinsic
def store(context: Any, array: Any, index: Any, vector: Any) -> Any:
    """array[index : index + 16] = vector"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1], _FLOATS)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, _VECTOR), generate


@intrinsic
def load_state(context: Any, array: Any, index: Any) -> Any:
    """As `load`; the array may also hold bfloat16, as uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        pointer = _address(context, builder, signature.args[0], args[0], args[1], _FLOATS if wide else _HALVES)
        loaded = builder.load(pointer, align=4 if wide else 2)
        return loaded if wide else _widen(builder, loaded)

    return _VECTOR(array, types.int64), generate


@intrinsic
def store_state(context: Any, array: Any, index: Any, vector: Any, noise: Any) -> Any:
    """As `store`; where the array holds bfloat16, as uint16, rounded up by the odds that `noise` decides."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        pointer = _address(context, builder, signature.args[0], args[0], args[1], _FLOATS if wide else _HALVES)
        builder.store(args[2] if wide else _narrow(builder, args[2], args[3]), pointer, align=4 if wide else 2)
        return context.get_dummy_value()

    return types.none(array, types.int64, _VECTOR, _VECTOR), generate


def _widen(builder: Any, halves: Any) -> Any:
    """float32 from the bits of bfloat16."""
    bits = builder.shl(builder.zext(halves, _INTS), ir.Constant(_INTS, [16] * LANES))
    return builder.bitcast(bits, _FLOATS)


def _narrow(builder: Any, vector: Any, noise: Any) -> Any:
    """The bits of bfloat16: `noise` is added to the 16 bits that are then dropped. NaN stays NaN, whatever its bits:
    added to the GPU's, 0x7FFFFFFF, noise would make it −0.0."""
    bits = builder.bitcast(vector, _INTS)
    quiet = builder.or_(bits, ir.Constant(_INTS, [_QUIET] * LANES))
    up = builder.add(bits, builder.bitcast(noise, _INTS))
    chosen = builder.select(builder.fcmp_unordered("uno", vector, vector), quiet, up)
    return builder.trunc(builder.lshr(chosen, ir.Constant(_INTS, [16] * LANES)), _HALVES)


@intrinsic
def noise(context: Any, seed: Any) -> Any:
    """Sixteen numbers of 16 random bits that follow from `seed`: those of `vary` and `store_state`.

    The finaliser of MurmurHash3 (Appleby, public domain) over lanes a golden ratio apart.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.Constant(_INTS, [_GOLDEN * lane & 0xFFFFFFFF for lane in range(1, LANES + 1)])
        bits = builder.mul(lanes, _spread(builder, builder.add(builder.trunc(args[0], _INT), ir.Constant(_INT, 1))))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = builder.xor(bits, builder.lshr(bits, ir.Constant(_INTS, [shift] * LANES)))
            bits = builder.mul(bits, ir.Constant(_INTS, [factor] * LANES))
        return builder.bitcast(builder.lshr(bits, ir.Constant(_INTS, [16] * LANES)), _FLOATS)

    return _VECTOR(types.int64), generate


@intrinsic
def vary(context: Any, noise: Any, place: Any) -> Any:
    """Other noise for the row at `place`: for each lane it stays evenly spread over all seeds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shift = builder.mul(builder.trunc(args[1], _INT), ir.Constant(_INT, _GOLDEN // LANES | 1))
        bits = builder.add(builder.bitcast(args[0], _INTS), _spread(builder, builder.lshr(shift, ir.Constant(_INT, 8))))
        return builder.bitcast(builder.and_(bits, ir.Constant(_INTS, [0xFFFF] * LANES)), _FLOATS)

    return _VECTOR(_VECTOR, types.int64), generate


@intrinsic
def half(context: Any) -> Any:
    """The noise that rounds to the nearest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(ir.Constant(_INTS, [0x8000] * LANES), _FLOATS)

    return _VECTOR(), generate


@intrinsic
def load_state_end(context: Any, array: Any, index: Any, count: Any) -> Any:
    """As `load_state`, of `count` elements; zeros in the lanes after them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        kind, element, align = (_FLOATS, "f32", 4) if wide else (_HALVES, "i16", 2)
        pointer = _address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        function = _declare(builder, f"llvm.masked.load.v16{element}.p0", kind, [_BYTES, _INT, _MASK, kind])
        zeros = ir.Constant(kind, [0] * LANES)
        loaded = builder.call(function, [pointer, ir.Constant(_INT, align), _masked(builder, args[2]), zeros])
        return loaded if wide else _widen(builder, loaded)

    return _VECTOR(array, types.int64, types.int64), generate


@intrinsic
def store_state_end(context: Any, array: Any, index: Any, vector: Any, noise: Any, count: Any) -> Any:
    """As `store_state`, of the first `count` lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        kind, element, align = (_FLOATS, "f32", 4) if wide else (_HALVES, "i16", 2)
        pointer = _address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        function = _declare(builder, f"llvm.masked.store.v16{element}.p0", ir.VoidType(), [kind, _BYTES, _INT, _MASK])
        stored = args[2] if wide else _narrow(builder, args[2], args[3])
        builder.call(function, [stored, pointer, ir.Constant(_INT, align), _masked(builder, args[4])])
        return context.get_dummy_value()

    return types.none(array, types.int64, _VECTOR, _VECTOR, types.int64), generate


@intrinsic
def prefetch_states(context: Any, array: Any, index: Any) -> Any:
    """Asks for the cache lines of 32 elements, which need not exist, into the second cache.

    More lines can be under way to that one than to the first.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = _declare(builder, "llvm.prefetch.p0", ir.VoidType(), [_BYTES, _INT, _INT, _INT])
        flags = [ir.Constant(_INT, flag) for flag in (0, 2, 1)]
        pointer = _address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        builder.call(function, [pointer, *flags])
        if signature.args[0].dtype == types.float32:
            builder.call(function, [builder.gep(pointer, [ir.Constant(_INT, 64)]), *flags])
        return context.get_dummy_value()

    return types.none(array, types.int64), generate


@intrinsic
def splat(context: Any, value: Any) -> Any:
    """`value` in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0])

    return _VECTOR(types.float32), generate


@intrinsic
def spread(context: Any, array: Any, index: Any) -> Any:
    """array[index] in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1], _FLOAT)
        return _spread(builder, builder.load(pointer))

    return _VECTOR(array, types.int64), generate


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(_declare(builder, "llvm.fma.v16f32", _FLOATS, [_FLOATS] * 3), args)

    return _VECTOR(_VECTOR, _VECTOR, _VECTOR), generate


@intrinsic
def multiply(context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return _VECTOR(_VECTOR, _VECTOR), generate


@intrinsic
def subtract(context: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(*args)

    return _VECTOR(_VECTOR, _VECTOR), generate


@intrinsic
def relu(context: Any, vector: Any) -> Any:
    """max(vector, 0); NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zeros = ir.Constant(_FLOATS, [0.0] * LANES)
        return builder.select(builder.fcmp_unordered(">", args[0], zeros), args[0], zeros)

    return _VECTOR(_VECTOR), generate


@intrinsic
def nonzero(context: Any, vector: Any) -> Any:
    """An integer with bit i set where lane i is not zero (NaN is not)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.fcmp_unordered("!=", args[0], ir.Constant(_FLOATS, [0.0] * LANES))
        return builder.zext(builder.bitcast(bits, ir.IntType(16)), ir.IntType(64))

    return types.int64(_VECTOR), generate


@intrinsic
def lowest_bit(context: Any, bits: Any) -> Any:
    """The place of the lowest bit set in `bits`, which must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


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
    """Stores the lanes whose bit is set, side by side, from array[index] on, and anything in the rest of 16 places."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1], _FLOATS)
        builder.store(_chosen(builder, args[2], args[3]), pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, _VECTOR, types.int64), generate


@intrinsic
def store_places(context: Any, array: Any, index: Any, base: Any, bits: Any) -> Any:
    """As `store_chosen`, but stores `base` + the lane's number, in an int32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.Constant(_INTS, list(range(LANES)))
        places = builder.add(lanes, _spread(builder, builder.trunc(args[2], _INT)))
        pointer = _address(context, builder, signature.args[0], args[0], args[1], _INTS)
        builder.store(_chosen(builder, places, args[3]), pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64, types.int64), generate


@intrinsic
def move_chosen(context: Any, array: Any, index: Any, source: Any, bits: Any) -> Any:
    """As `store_chosen`, but of array[source : source + 16], in an int32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [_address(context, builder, signature.args[0], args[0], args[at], _INTS) for at in (1, 2)]
        vector = builder.load(pointers[1], align=4)
        builder.store(_chosen(builder, vector, args[3]), pointers[0], align=4)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64, types.int64), generate


def _chosen(builder: Any, vector: Any, bits: Any) -> Any:
    mask = builder.bitcast(builder.trunc(bits, ir.IntType(16)), _MASK)
    name = "f32" if vector.type == _FLOATS else "i32"
    function = _declare(
        builder, f"llvm.experimental.vector.compress.v16{name}", vector.type, [vector.type, _MASK, vector.type]
    )
    return builder.call(function, [vector, mask, ir.Constant(vector.type, ir.Undefined)])


@intrinsic
def sums(context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """A vector that starts with the sums of the lanes of a, b, c and d; each is added up as the same binary tree."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def fold(p: Any, q: Any, low: list[int], high: list[int]) -> Any:
            return builder.fadd(_shuffle(builder, p, q, low), _shuffle(builder, p, q, high))

        halves = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
        quarters = [n + 8 * block for block in range(4) for n in range(4)]
        ab, cd = fold(args[0], args[1], *halves), fold(args[2], args[3], *halves)
        abcd = fold(ab, cd, quarters, [n + 4 for n in quarters])
        pairs = [4 * block + n % 2 for block in range(4) for n in range(4)]
        abcd = fold(abcd, abcd, pairs, [n + 2 for n in pairs])
        firsts = [4 * (n % 4) for n in range(LANES)]
        return fold(abcd, abcd, firsts, [n + 1 for n in firsts])

    return _VECTOR(_VECTOR, _VECTOR, _VECTOR, _VECTOR), generate


@intrinsic
def total(context: Any, vector: Any) -> Any:
    """The sum of the lanes, added up as a binary tree."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (vector,) = args
        for half in (8, 4, 2, 1):
            turned = _shuffle(builder, vector, vector, [(lane + half) % LANES for lane in range(LANES)])
            vector = builder.fadd(vector, turned)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(_VECTOR), generate


@intrinsic
def take_ticket(context: Any, tickets: Any, index: Any) -> Any:
    """tickets[index]++ for an int64 array, safe among threads: the value before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(tickets, types.int64), generate


@intrinsic
def through_half(context: Any, value: Any) -> Any:
    """`value` rounded to float16 and back."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[0], ir.HalfType()), _FLOAT)

    return types.float32(types.float32), generate


@intrinsic
def through_bfloat(context: Any, value: Any) -> Any:
    """`value` rounded to bfloat16, ties to even, and back. NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _INT)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_INT, 16)), ir.Constant(_INT, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_INT, 0x7FFF)))
        kept = builder.bitcast(builder.and_(rounded, ir.Constant(_INT, 0xFFFF0000)), _FLOAT)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), args[0], kept)

    return types.float32(types.float32), generate
