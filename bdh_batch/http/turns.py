"""Whose turn it is among connections that have sent more than they may have at once.

What is new is looked at when it comes; what waits here shares a small part of every round of the event loop, so that a
connection that asks for little is served at once, whatever number of others sends however much.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.002
ROUND_TURNS = 8  # each may begin a request, whose work is done in the rounds that follow


class Turns:
    """A queue, first come, first served; who is called has had its turn, and may ask for another one."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()

    def add(self, turn: Callable[[], object]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._round)
        self._waiting.append(turn)

    def _round(self) -> None:
        end = time.perf_counter() + ROUND_SECONDS
        for _ in range(min(ROUND_TURNS, len(self._waiting))):
            try:
                self._waiting[0]()  # it stays in the queue meanwhile, so that no second round is begun
            except Exception:
                log.exception("a connection's turn failed")
            self._waiting.popleft()
            if time.perf_counter() > end:
                break
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._round)
