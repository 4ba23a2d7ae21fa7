"""Mailboxes hold a request's deltas for its reader, on the event loop; the worker never waits for a client."""

from __future__ import annotations

import asyncio

from bdh_batch.messages import Delta, Gathering, Taker

BACKLOG = 64
TURN = 256  # mailboxes whose deltas are offered before others have their turn on the event loop


class Deliveries:
    """Offers what has come to many mailboxes to their takers, in one callback of the event loop: waking a task for each
    would take longer than all else that is done for a token."""

    def __init__(self) -> None:
        self._due: list[Mailbox] = []

    def add(self, mailbox: Mailbox) -> None:
        """The deltas of `mailbox` are offered once all that is ready on the event loop by now has run."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self._offer)
        self._due.append(mailbox)

    def _offer(self) -> None:
        due, self._due = self._due[:TURN], self._due[TURN:]
        if self._due:
            asyncio.get_running_loop().call_soon(self._offer)
        for mailbox in due:
            mailbox.offer()


class Mailbox:
    """Holds deltas of one request's sequences, distinguished by their index, until they are read.

    A reader that keeps up gets every delta as it was; for one that falls more than BACKLOG deltas behind, later ones
    are merged into the last of their sequence, so that an unread stream takes the memory of its text and no more.

    A reader may leave a taker behind: while it waits in `take`, new deltas are offered to that, and it is woken only
    for those that the taker does not take.
    """

    def __init__(self, deliveries: Deliveries | None = None) -> None:
        self._pending: list[tuple[int, Delta]] = []
        self._last: dict[int, int] = {}  # of each sequence, where its last delta is, from BACKLOG on
        self._merged: dict[int, Gathering] = {}  # what replaces those deltas
        self._arrived = asyncio.Event()
        self._deliveries = Deliveries() if deliveries is None else deliveries
        self._taker: Taker | None = None
        self._is_awaited = False  # by its reader
        self._failure: Exception | None = None  # of the taker

    def put(self, index: int, delta: Delta) -> None:
        if len(self._pending) >= BACKLOG:
            self._merge(index, delta)
            return
        self._pending.append((index, delta))
        if self._taker is None or not self._is_awaited:
            self._arrived.set()
        elif len(self._pending) == 1:
            self._deliveries.add(self)

    async def take(self) -> list[tuple[int, Delta]]:
        """Waits for the next deltas and returns all that there are, oldest first. Raises what the taker has raised."""
        self._is_awaited = True
        try:
            await self._arrived.wait()
        finally:
            self._is_awaited = False
        if self._failure is not None:
            raise self._failure
        self._arrived.clear()
        pending, self._pending = self._pending, []
        for at, merged in self._merged.items():
            pending[at] = pending[at][0], merged.whole()
        self._last.clear()
        self._merged.clear()
        return pending

    def offer_to(self, taker: Taker | None) -> None:
        """From now on, what comes while `take` waits is offered to `taker` first; None is as before."""
        self._taker = taker

    def offer(self) -> None:
        """Offers all that there is to the taker, unless its reader has been woken."""
        if self._arrived.is_set() or not self._pending:
            return
        taken = False
        if self._taker is not None and self._is_awaited and not self._last:
            try:
                taken = self._taker(self._pending)
            except Exception as error:  # noqa: BLE001 - `take` raises it
                self._failure = error
        if taken:
            self._pending = []
        else:
            self._arrived.set()

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
