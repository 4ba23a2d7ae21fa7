"""Slots in host memory through which states come from files, and go to files. Pure: it reads and writes no file.

They are numbered behind all others. A state that was read is moved from there to the slot of the sequence that begins
in it, or copied where it is needed again. A state that is to be written is copied there, in the step after its sequence
has ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bdh_batch.messages import SavedState
from bdh_batch.scheduler.copies import Copies, Save
from bdh_batch.scheduler.slots import Slots

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class Load:
    """A state that is to be read from a file to `slot`, for all sequences of one namespace that wait for it."""

    state: SavedState
    tokens: bytes  # packed: those that should have entered it
    namespace: str
    slot: int = NO_SLOT  # until there is one for it
    waiting: dict[Sequence, None] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, bytes]:
        return self.state.path, self.namespace, self.tokens


class Transfers:
    """Holds the slots for states on their way from and to files, and knows which sequences wait for which state.

    Args:
        first: the number of the first one.
        count: how many there are.
        copies: from and to them, among others.
        kept: free ones that are never idle.
    """

    def __init__(self, first: int, count: int, copies: Copies, kept: int = 0) -> None:
        self.first = first
        self.count = count
        self.to_come = 0  # sequences under way whose states are to be saved
        self._copies = copies
        self._slots = Slots(count, kept=kept)
        self._loading: set[int] = set()
        self._loads: dict[tuple[str, str, bytes], Load] = {}
        self._load_of: dict[Sequence, Load] = {}
        self._planned: dict[Sequence, Save] = {}  # for the next plans; they still hold the slots that they ran in
        self._left: list[int] = []  # from which nobody begins any more; copies may still read them

    @property
    def pending(self) -> bool:
        """Whether there are copies for the next plan."""
        return bool(self._planned)

    @property
    def idle_since(self) -> float | None:
        """When the slot that has been free for longest, and has memory, became so; None where there is none but those
        kept."""
        return None if self.to_come else self._slots.idle_since

    def holds(self, slot: int) -> bool:
        return slot >= self.first

    @property
    def held(self) -> list[int]:
        """The slots of ended sequences whose states have not been copied."""
        return [sequence.slot for sequence in self._planned if sequence.slot is not None]

    def take_save(self) -> Save | None:
        """Returns the next save to plan the copy of, if there is one."""
        save = next(iter(self._planned.values()), None)
        if save is not None:
            del self._planned[save.sequence]
        return save

    # States that are read

    def await_load(self, sequence: Sequence, state: SavedState, namespace: str, tokens: bytes) -> None:
        """`sequence` waits until its state is read; those that wait for the same one share it."""
        load = Load(state, tokens, namespace)
        load = self._loads.setdefault(load.key, load)
        load.waiting[sequence] = None
        self._load_of[sequence] = load

    def stop_waiting(self, sequence: Sequence) -> None:
        """`sequence` has ended, or need not wait any longer."""
        load = self._load_of.pop(sequence)
        del load.waiting[sequence]
        if not load.waiting and load.slot == NO_SLOT:
            del self._loads[load.key]

    def take_loads(self) -> list[Load]:
        """Returns those that there is a slot for now, to be read. Some slots are left for those that are written."""
        taken: list[Load] = []
        for load in self._loads.values():
            if len(self._loading) >= max(1, self.count // 2):
                break
            if load.slot == NO_SLOT:
                slot = self._take()
                if slot is None:
                    break
                load.slot = slot
                self._loading.add(slot)
                taken.append(load)
        return taken

    def take_spare(self) -> int | None:
        """Returns a slot for a state that nobody waits for, if one is free. It does not count as one of those that
        `take_loads` may fill."""
        return self._take()

    def end_load(self, load: Load) -> None:
        """The state is in its slot, or could not be read; who asks for it from now on has it read again."""
        del self._loads[load.key]

    def leave(self, slot: int) -> None:
        """Nobody else begins in the state in `slot`."""
        self._left.append(slot)

    def take_left(self) -> list[int]:
        """Returns the slots that were left, and that no copy reads any more."""
        left = [slot for slot in self._left if slot not in self._copies.busy]
        self._left = [slot for slot in self._left if slot in self._copies.busy]
        return left

    # States that are written

    def save(self, sequence: Sequence, path: str, tokens: bytes) -> bool:
        """Plans that the state of `sequence`, which has ended, is copied. It keeps its slot until then. False where no
        slot is free for the copy."""
        slot = self._take()
        if slot is None:
            return False
        self._planned[sequence] = Save(sequence, slot, SavedState(path, sequence.computed), tokens)
        return True

    def keeps(self, sequence: Sequence) -> bool:
        """Whether `sequence`, which has ended, keeps its slot."""
        return sequence in self._planned

    def back(self, now: float) -> list[int]:
        """Returns slots that should be given memory, as states will soon be copied there."""
        ready = self._slots.touched + self._slots.free_count - self.count
        wanted = min(self.to_come, self.count // 2) - ready
        slots = [slot for _ in range(wanted) if (slot := self._slots.take_untouched()) is not None]
        for slot in slots:
            self._slots.give(slot, now)
        return [self.first + slot for slot in slots]

    # Their slots

    def give(self, slots: Iterable[int], now: float = 0.0) -> None:
        """Frees slots, which hold nothing that anyone needs, at `now`, in seconds that never go back."""
        for slot in slots:
            self._loading.discard(slot)
            self._slots.give(slot - self.first, now)

    def release_idle(self) -> int:
        """The slot that has been free for longest: its memory goes back to the system."""
        return self.first + self._slots.release_idle()

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold."""
        free = {self.first + slot for slot in self._slots.free}
        assert len({*free, *self._left}) == self._slots.free_count + len(self._left), "each is free once"
        assert self._loading.isdisjoint(free), "what is loaded is not free"
        assert all(load.waiting or load.slot != NO_SLOT for load in self._loads.values()), "what is read is awaited"

    def _take(self) -> int | None:
        slot = self._slots.take_touched()
        slot = self._slots.take_untouched() if slot is None else slot
        return None if slot is None else self.first + slot
