"""Hands deltas from the engine's thread to the event loop, where their outboxes are."""

from __future__ import annotations

import asyncio
import threading

from bdh_batch.scheduler.scheduler import Update

INTERVAL = 1e-3  # seconds between two wake-ups of the event loop at least: a lone stream has a token in a third of that


class HandOver:
    """Wakes the event loop for what comes after a while, however many sequences gained something; then the loop looks
    by itself, every INTERVAL, until nothing has come. So what comes meanwhile costs no wake-up, which takes longer than
    all else that is done for a lone stream's token.

    Args:
        loop: of the outboxes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._held: list[Update] = []
        self._looks = False  # whether the loop has been woken, or will look by itself

    def put(self, updates: list[Update]) -> bool:
        """Has the event loop deliver `updates`, in order, INTERVAL from now at the latest. May be called in any thread.

        Returns:
            False where the loop has been closed, as at the end of an `asyncio.run` that closed no model: nobody waits.
        """
        if self._loop.is_closed():
            return False
        with self._lock:
            self._held += updates
            wakes, self._looks = not self._looks, True
        if wakes:
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise
                return False
        return True

    def _deliver(self) -> None:
        with self._lock:
            held, self._held = self._held, []
            self._looks = bool(held)
        if held:
            self._loop.call_later(INTERVAL, self._deliver)
        for sequence, delta in held:
            sequence.client.outbox.put(sequence.client.index, delta)
