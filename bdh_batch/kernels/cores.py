"""What compiled loops ask of the system: the time, sleep, and cores.

What the system reads or writes lies in arrays of int64. Only on Linux a program chooses the cores of a thread, and has
semaphores in shared memory; elsewhere threads sleep for moments, and run where the system puts them.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from llvmlite import ir
from numba.core import types

from bdh_batch.kernels.cpu_layout import Longs
from bdh_batch.kernels.vector import inlined, intrinsic

LINUX = sys.platform == "linux"
SEMAPHORE = 4  # numbers that a semaphore takes
CORES = 128  # numbers that a set of cores takes: 8,192 of them
NAP = 50  # µs
MONOTONIC = 1 if LINUX else 6  # the number of a clock
OF_THREAD = 6  # the lowest bits of one that goes on while a thread has a core

_sem_wait: Any = types.ExternalFunction("sem_wait", types.int32(types.intp))
_sem_post: Any = types.ExternalFunction("sem_post", types.int32(types.intp))
_usleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_getcpu: Any = types.ExternalFunction("sched_getcpu", types.int32())
_getaffinity: Any = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, types.intp, types.intp))
_setaffinity: Any = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.intp, types.intp))


@intrinsic
def start_of(context: Any, array: Any) -> Any:
    """Where an array begins in memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), generate


@inlined
def address_of(numbers: Longs, index: int) -> Any:
    """Where numbers[index] lies in memory."""
    return start_of(numbers) + 8 * index


def make_semaphore(numbers: Longs, index: int) -> None:
    """Makes numbers[index] … numbers[index + 3] a semaphore that nobody has posted."""
    if LINUX and ctypes.CDLL(None, use_errno=True).sem_init(_pointer(numbers, index), 0, 0):
        raise OSError(ctypes.get_errno(), "no semaphore could be made")


def post_semaphore(numbers: Longs, index: int) -> None:
    """`post` outside of compiled loops."""
    if LINUX:
        ctypes.CDLL(None).sem_post(_pointer(numbers, index))


def _pointer(numbers: Longs, index: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers[index:].ctypes.data)


@inlined
def post(numbers: Longs, index: int) -> None:
    """Has one `wait` return, now or later."""
    if LINUX:
        _sem_post(address_of(numbers, index))


@inlined
def wait(numbers: Longs, index: int) -> bool:
    """Sleeps until somebody posts, or for no reason; returns whether it was a post."""
    if LINUX:
        return bool(_sem_wait(address_of(numbers, index)) == 0)
    _usleep(NAP)
    return False


@inlined
def now(numbers: Longs, index: int) -> Any:
    """ns; numbers[index] and the next one are written."""
    _clock_gettime(MONOTONIC, address_of(numbers, index))
    return numbers[index] * 1_000_000_000 + numbers[index + 1]


@inlined
def time_of_thread(thread: int, numbers: Longs, index: int) -> Any:
    """ns for which a thread of this process has had a core; numbers[index] and the next one are written."""
    _clock_gettime(~thread << 3 | OF_THREAD, address_of(numbers, index))
    return numbers[index] * 1_000_000_000 + numbers[index + 1]


@inlined
def own_core() -> int:
    """The core on which the caller runs."""
    return _getcpu() if LINUX else 0


@inlined
def other_cores(core: int, found: Longs) -> bool:
    """Writes down the cores that the caller's thread may run on, but for one; returns whether there are any."""
    found[:] = 0
    if not LINUX or _getaffinity(0, 8 * CORES, address_of(found, 0)) < 0:
        return False
    found[core // 64] &= ~(1 << core % 64)
    return bool(found.any())


@inlined
def move(thread: int, cores: Longs) -> None:
    """Lets a thread of this process run on some cores and no others. Where the system refuses, it stays where it is."""
    if LINUX:
        _setaffinity(thread, 8 * CORES, address_of(cores, 0))
