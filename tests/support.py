"""What tests of several folders look at."""

from __future__ import annotations

import ctypes
import mmap

import torch


def resident(block: torch.Tensor) -> int:
    """Bytes of `block`, which begins where a page does, that lie in main memory."""
    libc, pages_of = ctypes.CDLL(None, use_errno=True), -(-block.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages_of)()
    assert libc.mincore(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(block.nbytes), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE
