"""Memory that is backed with pages before its first use.

The kernel gives fresh memory page by page as it is first written, which takes ten times as long as writing it: a state
that begins in fresh memory would hold up a step. So a thread has the kernel back the next ones in advance.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading

from torch import Tensor

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23  # Linux 5.14: backs pages, and leaves what they hold as it is
AHEAD = 2**29  # bytes
LEAST_AHEAD = 2  # blocks


class PagesAhead:
    """Backs the blocks of `blocks` [count, …], in main memory, some way ahead of the last one used."""

    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks
        each = blocks[0].nbytes if len(blocks) else 1
        self._ahead = max(LEAST_AHEAD, AHEAD // each)
        self._wanted = 0  # blocks before it should be backed
        self._backed = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def used(self, block: int) -> None:
        """`block` is about to be written. Does not wait for anything."""
        if block + self._ahead <= self._wanted or self._wanted == len(self._blocks):
            return
        with self._lock:
            # Some way further than is needed now, so that a thread has something to do for its start.
            self._wanted = min(len(self._blocks), block + 2 * self._ahead)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="bdh-pages", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._backed >= self._wanted:
                    self._thread = None
                    return
                block, self._backed = self._backed, self._backed + 1
            if not populate(self._blocks[block]):
                return  # and never again: the thread that ended stays


def populate(block: Tensor) -> bool:
    """Backs the memory of `block` with pages. False, and nothing done, where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    start, end = block.data_ptr(), block.data_ptr() + block.nbytes
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if start >= end:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_WRITE) == 0:
        return True
    log.debug("states are not backed with memory ahead of their use: errno %d", ctypes.get_errno())
    return False
