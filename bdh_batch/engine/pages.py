"""Main memory for states: in huge pages where the kernel has them, backed before its first use, given back after it.

The kernel gives fresh memory page by page as it is first written, which takes ten times as long as writing it: a state
that begins in fresh memory would hold up a step. So a thread has the kernel back the next ones in advance.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bdh_batch.system.threads import USUAL_STACK, start_daemon

log = logging.getLogger(__name__)

HUGE = 2**21  # bytes of a huge page
MADV_POPULATE_WRITE = 23  # Linux 5.14: backs pages, and leaves what they hold as it is
AHEAD = 2**26  # bytes
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
    """Backs the blocks of `blocks` [count, …], in main memory, some way ahead of the last one used.

    Its thread calls nothing of torch: where the interpreter ends meanwhile, C++ in between would end the process.
    """

    def __init__(self, blocks: Tensor) -> None:
        assert blocks.is_contiguous()
        self._blocks = blocks  # holds the memory
        self._address, self._size = blocks.data_ptr(), blocks[0].nbytes if len(blocks) else 1  # of the first one
        self._count = len(blocks)
        self._ahead = max(LEAST_AHEAD, min(MOST_AHEAD, AHEAD // self._size))
        self._wanted = 0  # blocks before it should be backed
        self._backed = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Backs the first blocks, and returns when that is done. Before anything is used."""
        self._wanted = min(self._count, self._ahead)
        while self._backed < self._wanted and self._back(self._backed):
            self._backed += 1

    def used(self, block: int) -> None:
        """`block` is about to be written. Does not wait for anything."""
        if block + self._ahead <= self._wanted or self._wanted == self._count:
            return
        with self._lock:
            # Some way further than is needed now, so that a thread has something to do for its start.
            self._wanted = min(self._count, block + 2 * self._ahead)
            if self._thread is None:
                self._thread = start_daemon(self._work, "bdh-pages", USUAL_STACK)

    def _work(self) -> None:
        _give_way()
        while True:
            with self._lock:
                if self._backed >= self._wanted:
                    self._thread = None
                    return
                block, self._backed = self._backed, self._backed + 1
            if not self._back(block):
                return  # and never again: the thread that ended stays

    def _back(self, block: int) -> bool:
        return _advise(self._address + block * self._size, self._size, MADV_POPULATE_WRITE)


def _give_way() -> None:
    """Has the calling thread run only on cores that nothing else wants: a step waits for the slowest of its threads."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux; or a sandbox forbids it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


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
