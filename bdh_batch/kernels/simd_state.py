"""Rows of states, float32 or bfloat16 with stochastic rounding, from and to vectors of float32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from bdh_batch.kernels.vector import (
    BYTES,
    FLOATS,
    HALVES,
    INT,
    INTS,
    LANES,
    MASK,
    VECTOR,
    address,
    broadcast,
    declare,
    intrinsic,
    masked,
    shuffle,
)

_QUIET = 0x00400000  # the bit of a NaN that keeps it one without its last 16
_UPPER = 0xFFFF0000
_GOLDEN = 0x9E3779B1  # 2³² / the golden ratio, odd: its multiples spread evenly


@intrinsic
def load_state(context: Any, array: Any, index: Any) -> Any:
    """As `load`; the array may also hold bfloat16, as uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        pointer = address(context, builder, signature.args[0], args[0], args[1], FLOATS if wide else HALVES)
        loaded = builder.load(pointer, align=4 if wide else 2)
        return loaded if wide else _widen(builder, loaded)

    return VECTOR(array, types.int64), generate


@intrinsic
def store_state(context: Any, array: Any, index: Any, vector: Any, noise: Any) -> Any:
    """As `store`; where the array holds bfloat16, as uint16, rounded up by the odds that `noise` decides."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        pointer = address(context, builder, signature.args[0], args[0], args[1], FLOATS if wide else HALVES)
        builder.store(args[2] if wide else _narrow(builder, args[2], args[3]), pointer, align=4 if wide else 2)
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR, VECTOR), generate


@intrinsic
def load_two(context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 32] as two vectors: one half and the other; of bfloat16, the even elements and the odd
    ones, which takes fewer instructions. `take_apart` brings others into this order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype == types.float32:
            loaded = [builder.load(each, align=4) for each in _two(context, builder, signature.args[0], *args)]
        else:
            words = builder.load(address(context, builder, signature.args[0], args[0], args[1], INTS), align=2)
            even = builder.shl(words, ir.Constant(INTS, [16] * LANES))
            odd = builder.and_(words, ir.Constant(INTS, [_UPPER] * LANES))
            loaded = [builder.bitcast(each, FLOATS) for each in (even, odd)]
        return context.make_tuple(builder, signature.return_type, loaded)

    both = types.UniTuple(VECTOR, 2)  # type: ignore[no-untyped-call]
    return both(array, types.int64), generate


@intrinsic
def store_two(context: Any, array: Any, index: Any, first: Any, second: Any, noise: Any) -> Any:
    """What `load_two` loaded, rounded as `store_state` does. NaN stays NaN if its last 16 bits are 0, as those are that
    come from a state in bfloat16, or from the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, *vectors, noise = args
        if signature.args[0].dtype == types.float32:
            for vector, pointer in zip(vectors, _two(context, builder, signature.args[0], array, index)):
                builder.store(vector, pointer, align=4)
        else:
            even, odd = (builder.add(*(builder.bitcast(each, INTS) for each in (vector, noise))) for vector in vectors)
            low = builder.lshr(even, ir.Constant(INTS, [16] * LANES))
            high = builder.and_(odd, ir.Constant(INTS, [_UPPER] * LANES))
            pointer = address(context, builder, signature.args[0], array, index, INTS)
            builder.store(builder.or_(low, high), pointer, align=2)
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR, VECTOR, VECTOR), generate


@intrinsic
def choose(context: Any, states: Any, natural: Any, apart: Any) -> Any:
    """`apart` where `states` are bfloat16, else `natural`: the one in the order of `load_two`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1] if signature.args[0].dtype == types.float32 else args[2]

    return natural(states, natural, apart), generate


@intrinsic
def take_apart(context: Any, source: Any, start: Any, target: Any, to: Any) -> Any:
    """target[to : to + 32] = the even and then the odd elements of source[start : start + 32]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = _two(context, builder, signature.args[0], args[0], args[1])
        first, second = (builder.load(each, align=4) for each in halves)
        for at, pointer in enumerate(_two(context, builder, signature.args[2], args[2], args[3])):
            builder.store(shuffle(builder, first, second, [2 * lane + at for lane in range(LANES)]), pointer, align=4)
        return context.get_dummy_value()

    return types.none(source, types.int64, target, types.int64), generate


@intrinsic
def put_together(context: Any, states: Any, array: Any, index: Any) -> Any:
    """Where `states` are bfloat16: the reverse of `take_apart` for array[index : index + 32], in place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0].dtype != types.float32:
            pointers = _two(context, builder, signature.args[1], args[1], args[2])
            first, second = (builder.load(each, align=4) for each in pointers)
            for at, pointer in zip((0, LANES // 2), pointers):
                turns = [at + lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
                builder.store(shuffle(builder, first, second, turns), pointer, align=4)
        return context.get_dummy_value()

    return types.none(states, array, types.int64), generate


def _two(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> tuple[Any, Any]:
    """Pointers to two vectors side by side at an array's element."""
    first = address(context, builder, array_type, array, index, FLOATS)
    return first, builder.gep(first, [ir.Constant(INT, 1)])


def _widen(builder: Any, halves: Any) -> Any:
    """float32 from the bits of bfloat16."""
    bits = builder.shl(builder.zext(halves, INTS), ir.Constant(INTS, [16] * LANES))
    return builder.bitcast(bits, FLOATS)


def _narrow(builder: Any, vector: Any, noise: Any) -> Any:
    """The bits of bfloat16: `noise` is added to the 16 bits that are then dropped. NaN stays NaN, whatever its bits:
    added to the GPU's, 0x7FFFFFFF, noise would make it −0.0."""
    bits = builder.bitcast(vector, INTS)
    quiet = builder.or_(bits, ir.Constant(INTS, [_QUIET] * LANES))
    up = builder.add(bits, builder.bitcast(noise, INTS))
    chosen = builder.select(builder.fcmp_unordered("uno", vector, vector), quiet, up)
    return builder.trunc(builder.lshr(chosen, ir.Constant(INTS, [16] * LANES)), HALVES)


@intrinsic
def noise(context: Any, seed: Any) -> Any:
    """Sixteen numbers of 16 random bits that follow from `seed`: those of `vary` and `store_state`.

    The finaliser of MurmurHash3 (Appleby, public domain) over lanes a golden ratio apart.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.Constant(INTS, [_GOLDEN * lane & 0xFFFFFFFF for lane in range(1, LANES + 1)])
        bits = builder.mul(lanes, broadcast(builder, builder.add(builder.trunc(args[0], INT), ir.Constant(INT, 1))))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = builder.xor(bits, builder.lshr(bits, ir.Constant(INTS, [shift] * LANES)))
            bits = builder.mul(bits, ir.Constant(INTS, [factor] * LANES))
        return builder.bitcast(builder.lshr(bits, ir.Constant(INTS, [16] * LANES)), FLOATS)

    return VECTOR(types.int64), generate


@intrinsic
def vary(context: Any, noise: Any, offset: Any) -> Any:
    """Other noise for the row at `offset`: for each lane it stays evenly spread over all seeds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shift = builder.mul(builder.trunc(args[1], INT), ir.Constant(INT, _GOLDEN // LANES | 1))
        bits = builder.add(builder.bitcast(args[0], INTS), broadcast(builder, builder.lshr(shift, ir.Constant(INT, 8))))
        return builder.bitcast(builder.and_(bits, ir.Constant(INTS, [0xFFFF] * LANES)), FLOATS)

    return VECTOR(VECTOR, types.int64), generate


@intrinsic
def half(context: Any) -> Any:
    """The noise that rounds to the nearest."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(ir.Constant(INTS, [0x8000] * LANES), FLOATS)

    return VECTOR(), generate


@intrinsic
def load_state_end(context: Any, array: Any, index: Any, count: Any) -> Any:
    """As `load_state`, of `count` elements; zeros in the lanes after them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        kind, element, align = (FLOATS, "f32", 4) if wide else (HALVES, "i16", 2)
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        function = declare(builder, f"llvm.masked.load.v16{element}.p0", kind, [BYTES, INT, MASK, kind])
        zeros = ir.Constant(kind, [0] * LANES)
        loaded = builder.call(function, [pointer, ir.Constant(INT, align), masked(builder, args[2]), zeros])
        return loaded if wide else _widen(builder, loaded)

    return VECTOR(array, types.int64, types.int64), generate


@intrinsic
def store_state_end(context: Any, array: Any, index: Any, vector: Any, noise: Any, count: Any) -> Any:
    """As `store_state`, of the first `count` lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = signature.args[0].dtype == types.float32
        kind, element, align = (FLOATS, "f32", 4) if wide else (HALVES, "i16", 2)
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        function = declare(builder, f"llvm.masked.store.v16{element}.p0", ir.VoidType(), [kind, BYTES, INT, MASK])
        stored = args[2] if wide else _narrow(builder, args[2], args[3])
        builder.call(function, [stored, pointer, ir.Constant(INT, align), masked(builder, args[4])])
        return context.get_dummy_value()

    return types.none(array, types.int64, VECTOR, VECTOR, types.int64), generate


@intrinsic
def copy_states(context: Any, array: Any, source: Any, target: Any, count: Any) -> Any:
    """array[target : target + count] = array[source : source + count], as bits. The two do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        come, go = (address(context, builder, kind, args[0], index, ir.IntType(8)) for index in args[1:3])
        size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        cgutils.raw_memcpy(builder, go, come, args[3], size)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64, types.int64), generate


@intrinsic
def prefetch_states(context: Any, array: Any, index: Any) -> Any:
    """Asks for the cache lines of 32 elements, which need not exist, as what will not be needed again soon.

    A step of many sequences goes over more than the last cache holds. What was there stays: weights, and all that the
    step needs beside its kernels.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [BYTES, INT, INT, INT])
        flags = [ir.Constant(INT, flag) for flag in (0, 0, 1)]
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(8))
        builder.call(function, [pointer, *flags])
        if signature.args[0].dtype == types.float32:
            builder.call(function, [builder.gep(pointer, [ir.Constant(INT, 64)]), *flags])
        return context.get_dummy_value()

    return types.none(array, types.int64), generate
