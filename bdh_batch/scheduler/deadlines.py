"""Finds the sequences that are past their deadlines."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from bdh_batch.errors import BDHError, QueueTimeout, RunTimeout

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence


SMALL = 64  # so many are not worth clearing out


class Deadlines:
    """Finds the sequences whose deadlines have passed."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, bool, Sequence]] = []
        self._clear_at = SMALL

    def add(self, sequence: Sequence) -> None:
        if len(self._heap) >= self._clear_at:  # most have ended long before their time
            self._heap = [item for item in self._heap if item[3].finish_reason is None]
            heapify(self._heap)
            self._clear_at = max(SMALL, 2 * len(self._heap))
        if sequence.queue_deadline is not None:
            heappush(self._heap, (sequence.queue_deadline, sequence.standing.arrival, True, sequence))
        if sequence.deadline is not None:
            heappush(self._heap, (sequence.deadline, sequence.standing.arrival, False, sequence))

    def due(self, now: float) -> Iterator[tuple[Sequence, BDHError]]:
        """Those that have not ended by a deadline of theirs, and the error with which they do; they should end before
        the next one is asked for. The first that have ended are let go, however far their time is off."""
        while self._heap and (self._heap[0][0] <= now or self._heap[0][3].finish_reason is not None):
            _, _, while_queued, sequence = heappop(self._heap)
            if sequence.finish_reason is not None or (while_queued and sequence.times.scheduled is not None):
                continue
            if sequence.times.scheduled is None:
                yield sequence, QueueTimeout("The request timed out while it waited in the queue.")
            else:
                yield sequence, RunTimeout("The request timed out before its response was complete.")
