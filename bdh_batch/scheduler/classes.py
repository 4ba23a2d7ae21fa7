"""The classes in which sequences compete: by `priority`, the lower first, and by how long they wait.

The rule, for those in the queue, suspended, and passed over by steps alike: who has had nothing computed for longer
than the patience competes in the first class there is, until it has to give its slot up. Inside a class tenants share
as ever. No class, however many of it come, can keep another one waiting for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence


def has_aged(sequence: Sequence, patience: float, now: float) -> bool:
    return now - sequence.served_at >= patience


class Classes:
    """
    Args:
        patience: seconds.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._present: Counter[int] = Counter()  # the priorities of all that have not ended
        self._were_mixed = False
        self.first = 0  # nobody is of an earlier one

    def enter(self, sequence: Sequence) -> None:
        sequence.served_at, sequence.rank = sequence.arrived, sequence.priority
        self._present[sequence.priority] += 1

    def leave(self, sequence: Sequence) -> None:
        self._present[sequence.priority] -= 1
        if not self._present[sequence.priority]:
            del self._present[sequence.priority]

    def rank(self, holding: Iterable[Sequence], now: float) -> None:
        """Says in which class each of those that hold a state competes; the queue does so for its own."""
        self.first = min(self._present, default=0)
        mixed = len(self._present) > 1
        if mixed or self._were_mixed:
            for sequence in holding:
                if sequence.priority > self.first and has_aged(sequence, self._patience, now):
                    sequence.aged = True
                sequence.rank = self.first if sequence.aged else sequence.priority
        self._were_mixed = mixed

    @staticmethod
    def demote(sequence: Sequence) -> None:
        """It has given its slot up, and waits in its own class again."""
        sequence.aged, sequence.rank = False, sequence.priority
