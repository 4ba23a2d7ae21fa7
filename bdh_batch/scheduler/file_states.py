"""Sequences that begin in states from files, and those that leave their own to files. Pure: it decides nothing of who
runs, and reads and writes no file. The slots that the states lie in on their way are in `transfers.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Many

from bdh_batch.errors import BDHError, InvalidRequest
from bdh_batch.messages import Delta, FinishReason
from bdh_batch.messages.state import INVALID
from bdh_batch.scheduler.copies import Save
from bdh_batch.scheduler.prefixes import pack
from bdh_batch.scheduler.sequence import Sequence, Stage
from bdh_batch.scheduler.sharing import Sharing
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.transfers import Load

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class FileStates:
    """Has states read that sequences begin in, and written that are to be saved."""

    def __init__(self, allocator: SlotAllocator, sharing: Sharing) -> None:
        self._allocator = allocator
        self._sharing = sharing
        self._transfers = allocator.transfers

    # States that are read

    def awaits(self, candidate: Sequence) -> Stage | None:
        """The stage in which it waits until the state that it begins in is read: that is neither there nor cached."""
        state = candidate.state
        if state is None or candidate.prefix.loaded is not None or self._sharing.holds_state(candidate, state.tokens):
            return None
        self._transfers.await_load(candidate, state, *self._sharing.prefix_of(candidate, state.tokens))
        return Stage.AWAITING_STATE

    def loaded(
        self, load: Load, waiting: Many[Sequence], error: str | None, room: int
    ) -> tuple[Many[Sequence], BDHError | None]:
        """A state is in its slot, or could not be read because of `error`. Those that were `waiting` wait no longer.

        Args:
            room: how many of them can begin now. No more keep the slot; others find the state cached, or ask for it
                again.

        Returns:
            Those that cannot do without it, and why they end.
        """
        self._transfers.end_load(load)
        if error is not None or not waiting:
            self._transfers.give([load.slot], self._allocator.now)
        else:
            self._sharing.loaded(waiting[:room], load)
        if error is None:
            return [], None
        refused = [sequence for sequence in waiting if not sequence.may_recompute]
        for sequence in waiting:
            sequence.state = None
        return refused, InvalidRequest(f"The state cannot be used: {error}", "state", INVALID)

    # States that are written

    def submitted(self, sequence: Sequence) -> None:
        self._transfers.to_come += sequence.save_to is not None

    def plan_copies(self) -> None:
        """Plans copies of states that are to be saved; their sequences leave their slots."""
        for sequence in self._allocator.copy_saves():
            self._sharing.bequeath(sequence)

    def save(self, ended: Iterable[tuple[Sequence, Delta]]) -> None:
        """Plans that the states of sequences that have just ended, and are complete, are written; a delta, its last,
        says where one is not."""
        for sequence, delta in ended:
            if sequence.save_to is not None and delta.finish_reason in COMPLETE:
                tokens = pack(sequence.known(0, sequence.computed))
                if not self._transfers.save(sequence, sequence.save_to, tokens):
                    delta.save_error = "Too many states are being written."

    def ended(self, sequence: Sequence) -> None:
        """It has ended, in whatever way; it keeps its slot until its state is copied, if that is to be saved."""
        self._sharing.expect_no_more(sequence)
        self._sharing.forget_loaded(sequence)
        self._transfers.to_come -= sequence.save_to is not None
        if sequence.slot is not None and not self._transfers.keeps(sequence):
            self._sharing.bequeath(sequence)

    def saved(self, save: Save, error: str | None) -> list[tuple[Sequence, Delta]]:
        """The state of an ended sequence is in its file, or that has failed with `error`."""
        self._transfers.give([save.slot], self._allocator.now)
        return [(save.sequence, Delta(saved=None if error else save.state, save_error=error))]

    def lost(self, saves: Iterable[Save]) -> list[tuple[Sequence, Delta]]:
        """Copies of states that were to be saved are not made."""
        return [update for save in saves for update in self.saved(save, "The copy of the state failed.")]
