"""Fills pieces of memory from a file, with a thread that helps: one core takes longer to copy a state from the system's
memory than for all else that is done with it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future

from bdh_batch.system.threads import Executor


class CutOff(Exception):
    """A file ends before all of the memory is filled. Raised while it is read."""


class Piece:
    """Memory that one of two threads fills from a file, from `offset` on."""

    def __init__(self, memory: memoryview, offset: int) -> None:
        self.memory = memory
        self.offset = offset
        self.filled: Future[None] = Future()

    def fill(self, file: int) -> None:
        try:
            fill(file, self.memory, self.offset)
        except Exception as error:  # noqa: BLE001 - whoever waits for it gets it
            self.filled.set_exception(error)
        else:
            self.filled.set_result(None)


def filled(
    file: int, pieces: Sequence[memoryview], offset: int, helper: Executor | None
) -> Generator[memoryview, None, None]:
    """Yields pieces in their order, each once it is filled from an open file, in which they lie on end.

    Args:
        offset: of the first one.
        helper: has a thread that fills some of them, if it is free; until all are yielded, or this is closed.

    Raises:
        CutOff, OSError
    """
    every: list[Piece] = []
    for memory in pieces:
        every.append(Piece(memory, offset))
        offset += len(memory)
    left = deque(every)  # each is taken by one thread
    helping: Future[None] | None = None
    try:
        if helper is not None:
            helping = helper.submit(_fill_all, file, left)
        for piece in every:
            while not piece.filled.done() and (mine := _take(left)) is not None:
                mine.fill(file)
            piece.filled.result()
            yield piece.memory
    finally:
        left.clear()
        if helping is not None and not helping.cancel():
            helping.result()


def fill(file: int, memory: memoryview, offset: int) -> None:
    """Fills memory from an open file, from `offset` on. Raises CutOff, OSError."""
    at = 0
    while at < len(memory):
        count = os.preadv(file, [memory[at:]], offset + at)
        if not count:
            raise CutOff
        at += count


def _fill_all(file: int, left: deque[Piece]) -> None:
    while (piece := _take(left)) is not None:
        piece.fill(file)


def _take(left: deque[Piece]) -> Piece | None:
    try:
        return left.popleft()
    except IndexError:
        return None
