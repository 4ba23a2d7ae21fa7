"""States on their way between slots and files, as the worker sees them: what it begins, and what it is notified of.

All but `Post` happens in the worker's thread, and nothing here waits for a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Many
from functools import partial
from typing import Protocol, TypeVar

from bdh_batch.errors import BDHError, InvalidRequest
from bdh_batch.messages import Delta
from bdh_batch.messages.state import INVALID
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.copies import Save
from bdh_batch.scheduler.scheduler import Scheduler, Update
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.transfers import Load

T = TypeVar("T")

INTERRUPTED = "it was not read to its end."

# Is called in any thread with why a file could not be read or written, for the client; None where it was.
Done = Callable[[str | None], None]
Post = Callable[[Callable[[], list[Update]]], None]  # has the worker call something, from any thread


class StateIO(Protocol):
    """Reads and writes the files of states: `state_io.StateIO`."""

    def back(self, slot: int) -> None: ...

    def read(self, load: Load, done: Done) -> None: ...

    def read_ahead(self, load: Load, done: Done, goes_on: Callable[[], bool]) -> None: ...

    def write(self, save: Save, done: Done) -> None: ...


class StateTraffic:
    """Has states read that sequences wait for, and written that are to be saved.

    Args:
        states: reads and writes; None where there are no transfer slots.
    """

    def __init__(self, scheduler: Scheduler, states: StateIO | None, post: Post) -> None:
        self._scheduler = scheduler
        self._states = states
        self._post = post
        self._unsaved: set[Sequence] = set()  # ended ones whose states are on their way to a file

    def check(self, sequences: Many[Sequence]) -> None:
        """Raises InvalidRequest where a sequence cannot do without a state, and there is no memory to read it to."""
        if self._states is not None:
            return
        for sequence in sequences:
            if sequence.state is not None and not sequence.may_recompute:
                raise InvalidRequest("This engine cannot begin in saved states.", "state", INVALID)
            sequence.state = None

    def begin(self, now: float) -> None:
        """Has states read, and memory made ready for those that will be saved. A plan has been made."""
        if self._states is None:
            return
        for slot in self._scheduler.transfers.back(now):
            self._states.back(slot)
        for load in self._scheduler.transfers.take_loads():
            self._states.read(load, partial(self._done, self._scheduler.loaded, load))

    def computed(self, step: Step) -> None:
        """The copies of `step` were made, or at least begun."""
        for save in step.saves:
            assert self._states is not None, "there are transfer slots only with those who write from them"
            self._states.write(save, partial(self._done, self._scheduler.files.saved, save))

    def settle(self) -> None:
        """The copies that were planned are made, or will never be: states in which nobody else begins may go."""
        transfers = self._scheduler.transfers
        transfers.give(transfers.take_left(), time.monotonic())

    def published(self, updates: list[Update]) -> None:
        for sequence, delta in updates:
            if sequence.save_to is not None:
                ended = delta.ends == 1 and delta.finish_reason is not None
                (self._unsaved.add if ended else self._unsaved.discard)(sequence)

    def last_words(self, error: BDHError) -> list[Update]:
        """What is said of the states that the worker will not see written."""
        return [(sequence, Delta(save_error=error.message)) for sequence in self._unsaved]

    def _done(self, report: Callable[[T, str | None], list[Update]], transfer: T, error: str | None) -> None:
        """Is called in another thread: a state was read or written, or could not be."""
        self._post(partial(report, transfer, error))
