"""A team of threads that take the pieces of a step, loop by loop.

A thread waits only for pieces that others hold, never for a thread: one whose core another program has takes no piece,
and the others do its share. Knows nothing of what a piece is. Helpers are started once. Between steps they first yield
their core, then sleep for moments, then wait for the next step without taking any time.

The board's work counter is one number, `generation << 40 | loop << 24 | piece`: who raises it has the piece. It can be
raised only as it was read, so a helper that was away for a step takes nothing of the next one by mistake.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from bdh_batch.kernels.cpu_layout import Longs
from bdh_batch.kernels.vector import address, compiled, inlined, intrinsic

COUNTER, DONE, LOOPS, ENDED, RESTS = 0, 8, 16, 24, 32  # numbers on the board, each in a cache line of its own
BOARD = 40
GENERATION, LOOP = 40, 24  # bits of the counter before them
PIECES = 1 << LOOP
MOST_LOOPS = 1 << GENERATION - LOOP
OVER = MOST_LOOPS - 1  # the loop of a counter whose step is finished; the next one may be being written down
GENERATIONS = 1 << 63 - GENERATION
NOTHING, FINISHED = -1, -2  # what `take` gives when no piece is left of the loop, or of the step
SPINS = 2000  # of a thread that waits for a piece: about 20 µs, as pieces are under way
YIELDS = 200  # after these, before it sleeps: about 100 µs where no other program wants the core
NAP = 50  # µs
NAPS = 100  # of a helper, before it waits for the next step: about 10 ms
NAME = "bdh-kernels"

_yield_core: Any = types.ExternalFunction("sched_yield", types.int32())
_sleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))

Serve = Callable[[int], None]


class Team:
    """The threads of one engine, of which the caller's is number 0.

    Args:
        threads: of the team, the caller's included.
        board: where the caller puts steps up.
        serve: takes pieces as the helper of that number, until the board had no step for some time, or ENDED is set.
    """

    def __init__(self, threads: int, board: Longs, serve: Serve) -> None:
        self._wake = [threading.Event() for _ in range(1, threads)]
        for number, wake in enumerate(self._wake, 1):
            threading.Thread(target=_help, args=(number, board, wake, serve), name=NAME, daemon=True).start()
        weakref.finalize(self, _end, board, self._wake)

    def wake(self) -> None:
        """Has helpers that wait look at the board again. To be called once a step is on it."""
        for wake in self._wake:
            if not wake.is_set():
                wake.set()


def new_board() -> Longs:
    """A board without a step."""
    board = np.zeros(BOARD, np.int64)
    board[COUNTER] = OVER << LOOP
    return board


def _help(number: int, board: Longs, wake: threading.Event, serve: Serve) -> None:
    while True:
        wake.clear()
        serve(number)  # sees a step that came before the line above
        if board[ENDED]:
            return
        wake.wait()


def _end(board: Longs, helpers: list[threading.Event]) -> None:
    board[ENDED] = 1
    for wake in helpers:
        wake.set()


@intrinsic
def read(context: Any, array: Any, index: Any) -> Any:
    """array[index] of int64, and what was written before it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def write(context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value; who reads it sees what was written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), generate


@intrinsic
def add(context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value; gives what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, args[2], "acq_rel")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def replace(context: Any, array: Any, index: Any, old: Any, new: Any) -> Any:
    """array[index] = new if it is still `old`; gives whether it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        outcome = builder.cmpxchg(pointer, args[2], args[3], "acq_rel", "acquire")
        return builder.extract_value(outcome, 1)

    return types.boolean(array, types.int64, types.int64, types.int64), generate


@inlined
def put_up(board: Longs, loops: int) -> None:
    """Begins a step of so many loops; how many pieces each has must have been written down before."""
    generation = ((board[COUNTER] >> GENERATION) + 1) % GENERATIONS
    board[DONE], board[LOOPS], board[RESTS] = 0, loops, 0
    write(board, COUNTER, generation << GENERATION)


@inlined
def take(board: Longs, limits: Longs, generation: int) -> Any:
    """Takes a piece of the step `generation`: the counter as it was. Or NOTHING: others hold the loop's last ones; or
    FINISHED."""
    while True:
        taken = read(board, COUNTER)
        loop, piece = (taken >> LOOP) % MOST_LOOPS, taken % PIECES
        if taken >> GENERATION != generation or loop == OVER:
            return FINISHED
        if piece >= limits[loop]:
            return NOTHING
        if replace(board, COUNTER, taken, taken + 1):
            return taken


@inlined
def finish(board: Longs, limits: Longs, taken: int) -> None:
    """Says that a piece is done. The last one of a loop begins the next."""
    loop = (taken >> LOOP) % MOST_LOOPS
    pieces = limits[loop]  # once this piece counts as done, the limits may become those of the next step
    if add(board, DONE, 1) + 1 == pieces:
        following = OVER if loop + 1 == board[LOOPS] else loop + 1
        board[DONE] = 0
        write(board, COUNTER, (taken >> GENERATION << GENERATION) + (following << LOOP))


@compiled
def rest(count: int) -> None:
    """Waits for the `count`th time in a row: first not at all, then for a moment in which others may have the core."""
    if count >= SPINS + YIELDS:
        _sleep(NAP)
    elif count >= SPINS:
        _yield_core()
