"""The copies of states that are to be made, in the order in which they were planned: in each step as much of them as
there is time for. Pure.

A copy may take several steps. Until it is made, the slots that it reads and writes are busy: no sequence in one of them
is computed, and what is planned with them later is another copy, which comes after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdh_batch.messages import Copy, SavedState

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

NO_LIMIT = 2**62  # parts
NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """How much is copied in one step.

    Args:
        parts: equal ones that the copy of a state can be made in.
        most: of them in a step; None is no limit.
        rounded: as how many a part counts that is copied from or to the host, where states are narrower.
    """

    parts: int = 1
    most: int | None = None
    rounded: int = 1


WHOLE = CopyLimits()  # each copy is made in one step, however many there are


@dataclass(frozen=True, slots=True, eq=False)
class Save:
    """A state that is to be written to a file, once its copy to `slot` is made."""

    sequence: Sequence
    slot: int
    state: SavedState
    tokens: bytes  # packed: those that have entered it


@dataclass(slots=True, eq=False)
class _Planned:
    source: int
    target: int
    cost: int  # of each part
    parts: int
    save: Save | None
    made: int = 0  # parts, when the step is computed

    @property
    def moves(self) -> bool:
        return not self.cost


class Copies:
    """A queue of copies.

    Args:
        host: the numbers of the slots on the host.
    """

    def __init__(self, limits: CopyLimits, host: range) -> None:
        self._limits = limits
        self._most = limits.most or NO_LIMIT
        self._host = host
        self._waiting: deque[_Planned] = deque()  # of the first ones, a part may have been made
        self._computed: list[_Planned] = []  # that are part of the step that is being computed
        self._cost = 0  # of what waits
        self.busy: Set[int] = NOTHING  # slots that the copies read and write that are not made after this step

    def __len__(self) -> int:
        """How many are not made after the step that was planned last."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether as much is planned as the next step has time for."""
        return self._cost >= self._most

    def add(self, source: int, target: int, save: Save | None = None) -> None:
        cost = self._limits.rounded if source in self._host or target in self._host else 1
        self._waiting.append(_Planned(source, target, cost, self._limits.parts, save))
        self._cost += cost * self._limits.parts

    def move(self, source: int, target: int) -> None:
        """Plans a copy of a state that nobody needs in `source` then: its memory may change hands, which costs
        nothing."""
        self._waiting.append(_Planned(source, target, 0, 1, None))

    def take(self) -> tuple[list[Copy], list[Save]]:
        """Returns what the next step copies, and the states whose copies it completes that are to be saved."""
        copies: list[Copy] = []
        saves: list[Save] = []
        self._computed = []
        if not self._waiting:  # as mostly
            self.busy = NOTHING
            return copies, saves
        left = self._most
        while self._waiting:
            first = self._waiting[0]
            count = first.parts - first.made
            if not first.moves:
                count = min(count, left // first.cost if copies else max(1, left // first.cost))
            if not count:
                break
            copies.append(Copy(first.source, first.target, first.made, first.made + count, first.parts, first.moves))
            first.made += count
            left -= count * first.cost
            self._cost -= count * first.cost
            self._computed.append(first)
            if first.made < first.parts:
                break
            self._waiting.popleft()
            if first.save is not None:
                saves.append(first.save)
        self.busy = {slot for each in self._waiting for slot in (each.source, each.target)} or NOTHING
        return copies, saves

    def give_up(self) -> tuple[set[int], list[Save]]:
        """The step has failed: none of the copies is made any more. Returns their targets, which hold no state, and the
        states that are not saved."""
        lost = dict.fromkeys((*self._computed, *self._waiting))
        self._computed, self._cost, self.busy = [], 0, NOTHING
        self._waiting.clear()
        return {each.target for each in lost}, [each.save for each in lost if each.save is not None]
