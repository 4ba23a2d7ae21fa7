"""Sixteen float32 side by side as a type of Numba's, and how functions are compiled that use it.

A `Vector` is a value that lives in registers; LLVM splits it where the machine's are narrower. `PAIRS` is the same
register with a pair of bfloat16 in each lane, `SHORTS` with a pair of int16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic as _intrinsic, models, register_model

from bdh_batch.kernels.cache import MODULES, digest_of, keep_compiled

LANES = 16

FLOAT, INT = ir.FloatType(), ir.IntType(32)
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT, LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
BYTES = ir.IntType(8).as_pointer()

Vector = Any  # sixteen float32 in registers
Function = TypeVar("Function", bound=Callable[..., Any])


# Numba keeps what it compiled until the file of that very function changes. These functions are compiled into one
# another across files, so a change in any of them must count.
SOURCES = digest_of(*MODULES)


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
    """Threads that a program can have: one for each core, where nothing else says how many."""
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], _intrinsic(function))


class VectorType(types.Type):
    """Numba's type of sixteen float32 in registers."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


VECTOR: Any = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, FLOATS)  # type: ignore[no-untyped-call]


class PairsType(types.Type):
    """Numba's type of sixteen pairs of bfloat16 in registers."""

    def __init__(self) -> None:
        super().__init__(name="bfloat16x32")


PAIRS: Any = PairsType()


@register_model(PairsType)
class _PairsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, INTS)  # type: ignore[no-untyped-call]


class ShortsType(types.Type):
    """Numba's type of sixteen pairs of int16 in registers."""

    def __init__(self) -> None:
        super().__init__(name="int16x32")


SHORTS: Any = ShortsType()


@register_model(ShortsType)
class _ShortsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, INTS)  # type: ignore[no-untyped-call]


def address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, pointee: ir.Type) -> Any:
    """A pointer to `pointee` at an array's element."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def masked(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes."""
    lanes = ir.Constant(ir.VectorType(INT, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(count, INT)))


def broadcast(builder: Any, value: Any) -> Any:
    """A vector with `value` in every lane."""
    vector_type = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, ir.Constant(INT, 0))
    return shuffle(builder, first, first, [0] * LANES)


def shuffle(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    """Lanes of `a` (0 … 15) and `b` (16 … 31)."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, LANES), picks))


def declare(builder: Any, name: str, result: ir.Type, arguments: list[ir.Type]) -> Any:
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name=name)


MASK = ir.VectorType(ir.IntType(1), LANES)
