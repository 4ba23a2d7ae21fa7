"""Main memory for states: in huge pages where the kernel has them, backed before its first use, given back after it.

The kernel gives fresh memory page by page as it is first written, which takes ten times as long as writing it: a state
that begins in fresh memory would hold up a step. So the kernel is asked to back the next ones in advance, a huge page
at a time, by the engine's own thread: a thread beside it is not interrupted while the kernel makes a huge page, and
would keep a core from a step meanwhile.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HUGE = 2**21  # bytes of a huge page
MADV_POPULATE_WRITE = 23  # Linux 5.14: backs pages, and leaves what they hold as it is
AHEAD = 2**28  # bytes, while the engine is idle
LEAST_AHEAD, MOST_AHEAD = 2, 16  # blocks


def reserve(shape: Sequence[int], dtype: torch.dtype, huge: bool = True) -> Tensor:
    """A tensor in main memory that takes none until it is written, and holds zeros.

    Args:
        huge: whether huge pages are asked for, which may be in vain.

    Raises:
        MemoryError: the system does not promise so much.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    try:
        # So much more that it can begin where a huge page does. Private: only then can it be given back.
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes cannot be allocated: {error}") from error
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:  # a kernel without them
            log.debug("huge pages are not used: %s", error)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size].view(dtype).view(*shape)


def in_huge_pages(block: Tensor, maps: Path = Path("/proc/self/smaps")) -> int:
    """Bytes of the mapping that `block` begins in that lie in huge pages now; 0 where the system does not report it."""
    try:
        lines = maps.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return 0
    inside = False
    for line in lines:
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= block.data_ptr() < int(mapping[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def release(block: Tensor) -> bool:
    """The memory of `block`, which `reserve` gave, goes back to the system, but for pages that it shares with
    neighbours: what it holds is lost. False, and nothing done, where the system cannot."""
    return _advise(block.data_ptr(), block.nbytes, getattr(mmap, "MADV_DONTNEED", None))


class PagesAhead:
    """Backs the blocks of `blocks` [count, …], in main memory, some way ahead of the last one used."""

    def __init__(self, blocks: Tensor) -> None:
        assert blocks.is_contiguous()
        self._blocks = blocks  # holds the memory
        self._address, self._bytes = blocks.data_ptr(), blocks.nbytes
        self._size = blocks[0].nbytes if len(blocks) else 1  # of the first one
        self._ahead = max(LEAST_AHEAD, min(MOST_AHEAD, AHEAD // self._size))
        self._used = 0  # blocks
        self._backed = 0  # bytes

    def begin(self) -> None:
        """Backs the first blocks. Before anything is used."""
        while self._back(LEAST_AHEAD):
            pass

    def used(self, block: int) -> None:
        """`block` is about to be written."""
        if block >= self._used:
            self._used = block + 1
            self._backed = max(self._backed, self._used * self._size)

    def back(self, idle: bool) -> bool:
        """Backs a huge page more, or none if there is enough ahead: one block where a step waits for it, several
        while the engine is idle. Whether it did."""
        return self._back(self._ahead if idle else 1)

    def _back(self, ahead: int) -> bool:
        begin, end = self._backed, min(self._bytes, (self._used + ahead) * self._size)
        if begin >= end:
            return False
        self._backed = min(end, begin + HUGE)
        if _advise(self._address + begin, self._backed - begin, MADV_POPULATE_WRITE):
            return True
        self._backed = self._bytes  # the system cannot: it is not asked again
        return False


def populate(block: Tensor) -> bool:
    """Backs the memory of `block` with pages. False, and nothing done, where the system cannot."""
    return _advise(block.data_ptr(), block.nbytes, MADV_POPULATE_WRITE)


def _advise(start: int, size: int, advice: int | None) -> bool:
    """Says `advice` of the whole pages in so many bytes from an address on. False where the system does not take it."""
    if advice is None or not sys.platform.startswith("linux"):
        return False
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if start >= end:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice) == 0:
        return True
    log.debug("the system does not take advice %d on memory: errno %d", advice, ctypes.get_errno())
    return False
