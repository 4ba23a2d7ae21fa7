"""Mailboxes hold a request's deltas for its reader, on the event loop; the worker never waits for a client."""

from __future__ import annotations

import asyncio

from bdh_batch.messages import Delta, Gathering

BACKLOG = 64


class Mailbox:
    """Holds deltas of one request's sequences, distinguished by their index, until they are read.

    A reader that keeps up gets every delta as it was; for one that falls more than BACKLOG deltas behind, later ones
    are merged into the last of their sequence, so that an unread stream takes the memory of its text and no more.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, Delta]] = []
        self._last: dict[int, int] = {}  # of each sequence, where its last delta is, from BACKLOG on
        self._merged: dict[int, Gathering] = {}  # what replaces those deltas
        self._arrived = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        if len(self._pending) < BACKLOG:
            self._pending.append((index, delta))
            self._arrived.set()
        else:
            self._merge(index, delta)

    async def take(self) -> list[tuple[int, Delta]]:
        """Waits for the next deltas and returns all that there are, oldest first."""
        await self._arrived.wait()
        self._arrived.clear()
        pending, self._pending = self._pending, []
        for at, merged in self._merged.items():
            pending[at] = pending[at][0], merged.whole()
        self._last.clear()
        self._merged.clear()
        return pending

    def _merge(self, index: int, delta: Delta) -> None:
        if not self._last:
            self._last.update((each, at) for at, (each, _) in enumerate(self._pending))
        at = self._last.setdefault(index, len(self._pending))
        if at == len(self._pending):
            self._pending.append((index, delta))
            return
        if at not in self._merged:
            self._merged[at] = Gathering()
            self._merged[at].add(self._pending[at][1])
        self._merged[at].add(delta)
