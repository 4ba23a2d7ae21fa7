"""A pool of threads that take pieces of a step.

A step has groups of work that need nothing of each other. A group has loops, one after the other, and a loop pieces.
Nobody waits for a thread, but for pieces alone: a thread whose core another program has takes none, and the others do
its share. If it lost its core in a piece, the leader, when nothing else is left, gives it its own core and sleeps.

A group's counter is one number, `generation << 40 | loop << 24 | piece`: who raises it has the piece. It can be raised
only as it was read, so a helper that was away for a step takes nothing of the next one by mistake.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types

from bdh_batch.kernels import cores
from bdh_batch.kernels.cpu_layout import Longs
from bdh_batch.kernels.vector import address, compiled, inlined, intrinsic

# Numbers of the step, each in a cache line of its own. CHANGES counts whatever gives a thread that waits something to
# do; LEFT the groups that are not finished; ASLEEP the threads; CORE is the leader's, which helpers are kept away from.
CHANGES, GENERATION, GROUPS, LEFT, ENDED, ASLEEP, CORE, ALONE = range(0, 64, 8)
# Numbers of a thread: whether it sleeps, and is in a step; its id; how long it has had a core; its semaphore; a time.
SLEEPS, BUSY, THREAD_ID, HAD = range(4)
SLEEP = 8
TIME = SLEEP + cores.SEMAPHORE
THREAD = 16
COUNTER, DONE, BY_ROWS, BY_HEADS, LOOPS = range(5)  # numbers of a group: pieces of its even loops, and of its odd ones
GROUP = 8
GENERATION_BITS, LOOP_BITS = 40, 24  # bits of the counter before them
PIECES = 1 << LOOP_BITS
MOST_LOOPS = 1 << GENERATION_BITS - LOOP_BITS
OVER = MOST_LOOPS - 1  # the loop of a group that is finished
GENERATIONS = 1 << 63 - GENERATION_BITS
LEADER = 0  # the number of the thread that calls
NOTHING = -1  # is taken when no piece is left
LINGER = 200_000  # ns that a helper without a piece keeps its core, as waking takes some 50,000
PATIENCE = 20_000  # ns between the leader's looks at who holds the last pieces
NAME = "bdh-kernels"


class Board(NamedTuple):
    """What the threads of a pool share."""

    words: Longs
    threads: Longs  # [T, THREAD]
    groups: Longs  # [G, GROUP]
    mask: Longs  # of cores


Serve = Callable[[int], None]


class ThreadPool:
    """The threads of one engine, of which the caller's is number 0, the leader.

    Args:
        threads: of the pool, the caller's included.
        serve: takes pieces as the helper of that number until ENDED is set. It is compiled, or read from the disk, in
            the caller's thread before helpers start: what it raises then is the caller's, who waits for nothing else.
    """

    def __init__(self, threads: int, board: Board, serve: Serve) -> None:
        self._errors: list[Exception] = []  # of helpers that have ended
        if threads > 1:
            board.words[ENDED] = 1  # so that it returns at once
            serve(1)
            board.words[ENDED] = 0
        helpers: list[threading.Thread] = []
        weakref.finalize(self, _end, board, helpers)
        for number in range(1, threads):
            arguments = (number, board, serve, self._errors)
            helper = threading.Thread(target=_help, args=arguments, name=NAME, daemon=True)
            helper.start()
            helpers.append(helper)

    def check(self) -> None:
        """Raises what a helper raised, if one did."""
        if self._errors:
            raise self._errors[0]


def new_board(threads: int, groups: int) -> Board:
    """A board without a step, for so many threads, and at most so many groups."""
    board = Board(
        *(np.zeros(size, np.int64) for size in (64, threads * THREAD, groups * GROUP, cores.CORES)),
    )
    board.words[CORE] = -1
    board.groups[COUNTER::GROUP] = OVER << LOOP_BITS
    for at in range(SLEEP, len(board.threads), THREAD):
        cores.make_semaphore(board.threads, at)
    return board


def _help(number: int, board: Board, serve: Serve, errors: list[Exception]) -> None:
    board.threads[number * THREAD + THREAD_ID] = threading.get_native_id()
    board.words[CORE] = -1  # so that the leader says where this thread may run
    try:
        serve(number)
    except Exception as error:  # noqa: BLE001 - the next step raises it
        errors.append(error)
    finally:
        board.threads[number * THREAD + THREAD_ID] = 0  # the system may give it to another thread


def _end(board: Board, helpers: Sequence[threading.Thread]) -> None:
    """Ends the helpers, and waits for them: one that came back while the interpreter ends would abort the process."""
    board.words[ENDED] = 1
    for at in range(SLEEP, len(board.threads), THREAD):
        cores.post_semaphore(board.threads, at)
    for helper in helpers:
        if helper is not threading.current_thread():
            helper.join()


@intrinsic
def read(context: Any, array: Any, index: Any) -> Any:
    """array[index] of int64, and what was written before it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def write(context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value; who reads it sees what was written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        builder.store_atomic(args[2], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), generate


@intrinsic
def add(context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value; gives what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def replace(context: Any, array: Any, index: Any, old: Any, new: Any) -> Any:
    """array[index] = new if it is still `old`; gives whether it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = address(context, builder, signature.args[0], args[0], args[1], ir.IntType(64))
        outcome = builder.cmpxchg(pointer, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(outcome, 1)

    return types.boolean(array, types.int64, types.int64, types.int64), generate


@inlined
def set_group(board: Board, group: int, by_rows: int, by_heads: int, loops: int) -> None:
    """Writes a group of the next step down: the pieces of its even loops, and of its odd ones."""
    at = group * GROUP
    board.groups[at + BY_ROWS], board.groups[at + BY_HEADS], board.groups[at + LOOPS] = by_rows, by_heads, loops
    board.groups[at + DONE] = 0


@compiled
def begin(board: Board, groups: int) -> None:
    """Begins a step of so many groups, which have been written down."""
    generation = (board.words[GENERATION] + 1) % GENERATIONS
    board.words[GROUPS], board.words[LEFT] = groups, groups
    for group in range(groups):
        write(board.groups, group * GROUP + COUNTER, generation << GENERATION_BITS)
    keep_away(board)
    write(board.words, GENERATION, generation)
    announce(board)


@inlined
def take(board: Board, group: int, generation: int) -> Any:
    """Takes a piece of a group in the step `generation`: the counter as it was; NOTHING if there is none."""
    at = group * GROUP
    while True:
        counter = read(board.groups, at + COUNTER)
        loop, piece = (counter >> LOOP_BITS) % MOST_LOOPS, counter % PIECES
        if counter >> GENERATION_BITS != generation or loop == OVER:
            return NOTHING
        if piece >= board.groups[at + (BY_HEADS if loop % 2 else BY_ROWS)]:
            return NOTHING
        if replace(board.groups, at + COUNTER, counter, counter + 1):
            return counter


@inlined
def finish(board: Board, group: int, counter: int) -> None:
    """Says that a piece is done. The last one of a loop begins the next."""
    at = group * GROUP
    loop = (counter >> LOOP_BITS) % MOST_LOOPS
    # Once this piece counts as done, what is written of the group may become that of the next step.
    pieces, loops = board.groups[at + (BY_HEADS if loop % 2 else BY_ROWS)], board.groups[at + LOOPS]
    if add(board.groups, at + DONE, 1) + 1 == pieces:
        following = OVER if loop + 1 == loops else loop + 1
        board.groups[at + DONE] = 0
        write(board.groups, at + COUNTER, (counter >> GENERATION_BITS << GENERATION_BITS) + (following << LOOP_BITS))
        if following == OVER:
            add(board.words, LEFT, -1)
        announce(board)


@inlined
def announce(board: Board) -> None:
    """Has threads that wait look at the board again; helpers that sleep, only if they have a core."""
    add(board.words, CHANGES, 1)
    if read(board.words, ASLEEP) > 0:
        wake(board)


@compiled
def wake(board: Board) -> None:
    for thread in range(1 if board.words[ALONE] else len(board.threads) // THREAD):
        if replace(board.threads, thread * THREAD + SLEEPS, 1, 0):
            add(board.words, ASLEEP, -1)
            cores.post(board.threads, thread * THREAD + SLEEP)


@compiled
def sleep(board: Board, thread: int, seen: int) -> None:
    """Sleeps until CHANGES is no longer what was `seen`, or the pool ends."""
    at = thread * THREAD
    add(board.words, ASLEEP, 1)  # first: were it less than the threads whose SLEEPS is set, some would not be woken
    write(board.threads, at + SLEEPS, 1)  # and only then CHANGES is looked at: who changes it later sees both
    posted = False
    while not posted and read(board.words, CHANGES) == seen and read(board.words, ENDED) == 0:
        posted = cores.wait(board.threads, at + SLEEP)
    if posted:
        return
    if replace(board.threads, at + SLEEPS, 1, 0):
        add(board.words, ASLEEP, -1)
        return
    while cores.LINUX and not cores.wait(board.threads, at + SLEEP):
        pass  # who has seen this thread asleep posts, and that must not count the next time


@compiled
def keep_away(board: Board) -> None:
    """Keeps the helpers from the leader's core, for the system may put a thread that it wakes beside who woke it, and
    leave it there. A leader that may run on no other core does without helpers."""
    core = cores.own_core()
    if core == read(board.words, CORE):
        return
    write(board.words, CORE, core)
    board.words[ALONE] = not cores.other_cores(core, board.mask)
    if not board.words[ALONE]:
        for at in range(THREAD, len(board.threads), THREAD):
            if board.threads[at + THREAD_ID]:
                cores.move(board.threads[at + THREAD_ID], board.mask)


@compiled
def hand_over(board: Board) -> bool:
    """Gives the leader's core to those helpers in the step that have had none since the last look, if any.

    Returns whether there are any: the leader has to sleep then."""
    found = False
    for at in range(THREAD, len(board.threads), THREAD):
        if cores.LINUX and board.threads[at + THREAD_ID] and read(board.threads, at + BUSY):
            had = cores.time_of_thread(board.threads[at + THREAD_ID], board.threads, TIME)
            if had == board.threads[at + HAD]:
                core = cores.own_core()
                board.mask[:] = 0
                board.mask[core // 64] = 1 << core % 64
                cores.move(board.threads[at + THREAD_ID], board.mask)
                found = True
            board.threads[at + HAD] = had
    return found


@compiled
def wait_for_change(leader: int, board: Board, seen: int) -> None:
    """The leader waits until CHANGES is no longer what was `seen`."""
    until = cores.now(board.threads, TIME) + PATIENCE
    while read(board.words, CHANGES) == seen:
        if cores.now(board.threads, TIME) > until:
            if hand_over(board):
                sleep(board, leader, seen)
                write(board.words, CORE, -1)
                keep_away(board)
            until = cores.now(board.threads, TIME) + PATIENCE
