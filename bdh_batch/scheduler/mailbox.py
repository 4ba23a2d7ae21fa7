"""Where a request's deltas wait for its reader. Lives on the event loop; the worker never waits for a client."""

from __future__ import annotations

import asyncio

from bdh_batch.messages import Delta

BACKLOG = 64


class Mailbox:
    """Deltas of one request's sequences, told apart by their index.

    A reader that keeps up gets every delta as it was; for one that falls more than BACKLOG deltas behind, later ones
    are merged into the last of their sequence, so that an unread stream takes the memory of its text and no more.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, Delta]] = []
        self._last: dict[int, Delta] = {}  # of each sequence, from BACKLOG on
        self._arrived = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        if len(self._pending) < BACKLOG:
            self._pending.append((index, delta))
            self._arrived.set()
        else:
            self._merge(index, delta)

    async def take(self) -> list[tuple[int, Delta]]:
        """Waits for the next deltas; gives all that are there, oldest first."""
        await self._arrived.wait()
        self._arrived.clear()
        pending, self._pending = self._pending, []
        self._last.clear()
        return pending

    def _merge(self, index: int, delta: Delta) -> None:
        if not self._last:
            self._last.update(self._pending)
        if index in self._last:
            self._last[index].absorb(delta)
        else:
            self._pending.append((index, delta))
            self._last[index] = delta
