"""Slots in host memory through which states come from files, and go to files. Pure: it reads and writes no file.

They are numbered behind all others. A state that was read is copied from there, by each sequence that begins in it; a
state that is to be written is copied there, in the step after its sequence has ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdh_batch.messages import Copy, SavedState

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Save:
    """A state that is to be written to a file, once the step with its copy to `slot` is computed."""

    sequence: Sequence
    slot: int
    state: SavedState
    tokens: bytes  # packed: those that have entered it


class Transfers:
    """Holds the slots for states on their way from and to files.

    Args:
        first: the number of the first one.
        count: how many there are.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.saves: list[Save] = []  # whose copies are part of the plan that is being made or computed
        self._free: list[int] = [*range(first, first + count)]
        self._loading: set[int] = set()
        self._planned: list[tuple[Save, Copy]] = []  # for the next plan
        self._left: list[int] = []  # from which nobody begins any more; copies of this plan may still read them

    @property
    def pending(self) -> bool:
        """Whether there are copies for the next plan."""
        return bool(self._planned)

    def holds(self, slot: int) -> bool:
        return slot >= self.first

    def begin(self) -> list[Copy]:
        """Begins a new plan: returns the copies that it begins with."""
        planned, self._planned = self._planned, []
        self.saves = [save for save, _ in planned]
        return [copy for _, copy in planned]

    def take_for_load(self) -> int | None:
        """A slot for a state that is to be read; None where there is none. Some are left for those that are written."""
        if not self._free or len(self._loading) >= max(1, self.count // 2):
            return None
        slot = self._free.pop()
        self._loading.add(slot)
        return slot

    def save(self, sequence: Sequence, path: str, tokens: bytes) -> bool:
        """Plans that the state of `sequence`, which has ended and still has its slot, is copied before that is used
        again. False where no slot is free for it."""
        if not self._free or sequence.slot is None:
            return False
        slot = self._free.pop()
        save = Save(sequence, slot, SavedState(path, sequence.computed), tokens)
        self._planned.append((save, Copy(sequence.slot, slot)))
        return True

    def leave(self, slot: int) -> None:
        """Nobody else begins in the state in `slot`."""
        self._left.append(slot)

    def take_left(self) -> list[int]:
        """Returns the slots that were left, and are not read by the copies of a plan any more."""
        left, self._left = self._left, []
        return left

    def give(self, slots: Iterable[int]) -> None:
        """Frees slots, which hold nothing that anyone needs."""
        for slot in slots:
            self._loading.discard(slot)
            self._free.append(slot)

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold."""
        assert len({*self._free, *self._left}) == len(self._free) + len(self._left), "each is free once"
        assert self._loading.isdisjoint(self._free), "what is loaded is not free"
