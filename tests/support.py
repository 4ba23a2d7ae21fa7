"""What tests of several folders look at."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import AsyncIterator

import httpx
import numpy as np
import torch
from xxhash import xxh3_128_hexdigest


async def event_lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream of events as they come. Those of httpx also end where Unicode has a line end, as at U+0085,
    which may be in the midst of a text."""
    left = b""
    async for piece in response.aiter_bytes():
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            yield line.decode()


def ending_in(file: bytes, number: float) -> bytes:
    """The file of a state whose last number, of float32, is another one; its checksum is right."""
    length = int.from_bytes(file[:8], "little")
    header, tensors = json.loads(file[8 : 8 + length]), file[8 + length : -4] + np.float32(number).tobytes()
    header["__metadata__"]["xxh3_128"] = xxh3_128_hexdigest(tensors)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def resident(block: torch.Tensor) -> int:
    """Bytes of `block`, which begins where a page does, that lie in main memory."""
    libc, pages_of = ctypes.CDLL(None, use_errno=True), -(-block.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages_of)()
    assert libc.mincore(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(block.nbytes), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE
