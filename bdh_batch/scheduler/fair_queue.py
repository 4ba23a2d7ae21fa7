"""Finds the next of the sequences that wait, in the order of `rank.py`.

The sequences of one tenant and priority wait in one queue. There may be very many tenants: nothing here goes over all
of them. A queue whose head has waited for longer than the patience competes in the first priority there is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from math import inf

from bdh_batch.scheduler.priorities import adjust, has_aged
from bdh_batch.scheduler.rank import RANK
from bdh_batch.scheduler.ranking import Ranking
from bdh_batch.scheduler.sequence import QueueKey, Sequence

AGE = 256  # queues at a time: a step does not wait for a crowd to age


class FairQueue:
    """Holds sequences that wait, and finds the first of them in rank.

    Args:
        patience: seconds after which a sequence that waits competes in the first priority.
    """

    def __init__(self, patience: float = inf) -> None:
        self.priorities: Counter[int] = Counter()  # of those that wait
        self._patience = patience
        self._queues: dict[QueueKey, list[Sequence]] = {}  # none of them is empty; the last one is due first
        self._ranked: Ranking[QueueKey] = Ranking(lambda key: RANK(self._queues[key][-1]))  # whose heads have not aged
        self._ageing: Ranking[QueueKey] = Ranking(lambda key: self._queues[key][-1].standing.served_at)  # the same
        self._aged: Ranking[QueueKey] = Ranking(lambda key: RANK(self._queues[key][-1])[1:])  # the others
        self._now = -inf

    def __len__(self) -> int:
        return self.priorities.total()

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._queues.values() for sequence in reversed(queue))

    def push(self, sequence: Sequence) -> None:
        sequence.standing.effective_priority = sequence.priority
        key = sequence.queue_key
        queue = self._queues.setdefault(key, [])
        sequence.standing.account.queues += not queue
        insort(queue, sequence, key=_latest_first)
        adjust(self.priorities, sequence.priority, 1)
        if queue[-1] is sequence:
            self._put(key)

    def remove(self, sequence: Sequence) -> None:
        key = sequence.queue_key
        queue = self._queues[key]
        del queue[bisect_left(queue, _latest_first(sequence), key=_latest_first)]
        if not queue:
            del self._queues[key]
            sequence.standing.account.queues -= 1
        adjust(self.priorities, sequence.priority, -1)
        self._put(key)

    def age(self, now: float) -> None:
        """Has those compete in the first priority that have waited too long by `now`, the first to come first."""
        self._now = now
        for _ in range(AGE):
            key = self._ageing.first()
            if key is None or not has_aged(self._queues[key][-1], self._patience, now):
                return
            self._put(key)

    def peek(self, first: int) -> Sequence | None:
        """The next one; no sequence, waiting or not, has a priority before `first`."""
        if (aged := self._aged.first()) is not None:
            self._queues[aged][-1].standing.effective_priority = first
        heads = (self._queues[key][-1] for key in (self._ranked.first(), aged) if key is not None)
        return min(heads, key=RANK, default=None)

    def last(self, queue_key: QueueKey) -> Sequence:
        """The last one of a queue in rank."""
        return self._queues[queue_key][0]

    def _put(self, key: QueueKey) -> None:
        """Another one is the head of this queue, or the head has aged."""
        for ranking in (self._ranked, self._ageing, self._aged):
            ranking.drop(key)
        if key not in self._queues:
            return
        if has_aged(self._queues[key][-1], self._patience, self._now):
            self._aged.put(key)
        else:
            self._ranked.put(key)
            self._ageing.put(key)


def _latest_first(sequence: Sequence) -> tuple[float, int]:
    return -sequence.standing.due, -sequence.standing.arrival
