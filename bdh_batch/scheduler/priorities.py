"""The priorities at which sequences compete: their own, the lower first, or the first one there is once they have aged.

A sequence that has had nothing computed for longer than the patience has aged, whether it waits in the queue, is
preempted, or is passed over by steps. It competes in the first priority until it gives its slot up. So no priority,
however many requests of it come, can keep another one waiting for ever; inside one, tenants share as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence


def has_aged(sequence: Sequence, patience: float, now: float) -> bool:
    return now - sequence.standing.served_at >= patience


class Priorities:
    """Keeps the effective priorities of sequences up to date.

    Args:
        patience: seconds.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._present: Counter[int] = Counter()  # the priorities of all sequences that have not ended
        self._were_mixed = False
        self.first = 0  # no sequence has an earlier one

    def enter(self, sequence: Sequence) -> None:
        sequence.standing.served_at, sequence.standing.effective_priority = sequence.arrived, sequence.priority
        self._present[sequence.priority] += 1

    def leave(self, sequence: Sequence) -> None:
        self._present[sequence.priority] -= 1
        if not self._present[sequence.priority]:
            del self._present[sequence.priority]

    def update(self, holding: Iterable[Sequence], now: float) -> None:
        """Ages those that hold a state; the queue does so for its own."""
        self.first = min(self._present, default=0)
        mixed = len(self._present) > 1
        if mixed or self._were_mixed:
            for sequence in holding:
                standing = sequence.standing
                if sequence.priority > self.first and has_aged(sequence, self._patience, now):
                    standing.aged = True
                standing.effective_priority = self.first if standing.aged else sequence.priority
        self._were_mixed = mixed

    @staticmethod
    def reset(sequence: Sequence) -> None:
        """It has given its slot up, and competes at its own priority again."""
        sequence.standing.aged, sequence.standing.effective_priority = False, sequence.priority
