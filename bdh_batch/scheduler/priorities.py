"""The priorities at which sequences compete: their own, the lower first, or the first one there is once they have aged.

A sequence that has had nothing computed for longer than the patience has aged, whether it waits in the queue, is
preempted, or is passed over by steps. It competes in the first priority until it gives its slot up. So no priority,
however many requests of it come, can keep another one waiting for ever; inside one, tenants share as ever.
"""

from __future__ import annotations

from collections import Counter

from bdh_batch.scheduler.running import Running
from bdh_batch.scheduler.sequence import Sequence


def has_aged(sequence: Sequence, patience: float, now: float) -> bool:
    return now - sequence.standing.served_at >= patience


def adjust(counts: Counter[int], priority: int, change: int) -> None:
    counts[priority] += change
    if not counts[priority]:
        del counts[priority]


class Priorities:
    """Keeps the effective priorities of running sequences up to date.

    Args:
        patience: seconds.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.present: Counter[int] = Counter()  # the priorities of all sequences that have not ended
        self._were_mixed = False
        self.first = self.last = 0  # no sequence has an earlier one, and no running one a later one

    def update(self, running: Running, now: float) -> None:
        """Ages those that run; the queues do so for their own."""
        self.first = self.last = min(self.present, default=0)
        mixed = len(self.present) > 1
        if mixed or self._were_mixed:
            for sequence in [*running]:
                own, before = sequence.priority, sequence.standing.effective_priority
                aged = before < own or has_aged(sequence, self._patience, now)
                if (priority := self.first if aged else own) != before:
                    running.remove(sequence)
                    sequence.standing.effective_priority = priority
                    running.push(sequence)
                self.last = max(self.last, priority)
        self._were_mixed = mixed
