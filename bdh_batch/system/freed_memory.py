"""Gives memory back to the system that large requests and responses have left behind.

glibc keeps what was freed, but for what lies at the end of its heaps: `malloc_trim` gives back the rest.
"""

from __future__ import annotations

import asyncio
import ctypes
import time

from bdh_batch.system.threads import start_daemon

WORTH_RETURNING = 64 * 2**20  # bytes
RETURN_SECONDS = 1.0  # after which memory is returned, once for all that was freed meanwhile


class FreedMemory:
    """Returns freed memory of the process, at most once in RETURN_SECONDS."""

    def __init__(self) -> None:
        self._next = 0.0  # from when on it may be planned again, by the monotonic clock

    def return_soon(self) -> None:
        """To be called on the event loop when more than WORTH_RETURNING bytes have been freed, or are about to be."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + RETURN_SECONDS
            asyncio.get_running_loop().call_later(RETURN_SECONDS, self._return)

    @staticmethod
    def _return() -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            start_daemon(lambda: trim(0), "bdh-trim")  # takes milliseconds, without the interpreter's lock


FREED_MEMORY = FreedMemory()
