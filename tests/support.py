"""What tests of several folders look at."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import AsyncIterator

import httpx
import torch


async def event_lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream of events as they come. Those of httpx also end where Unicode has a line end, as at U+0085,
    which may be in the midst of a text."""
    left = b""
    async for piece in response.aiter_bytes():
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            yield line.decode()


def resident(block: torch.Tensor) -> int:
    """Bytes of `block`, which begins where a page does, that lie in main memory."""
    libc, pages_of = ctypes.CDLL(None, use_errno=True), -(-block.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages_of)()
    assert libc.mincore(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(block.nbytes), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE
