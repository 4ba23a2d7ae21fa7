"""Keeps each sequence in the stage that it is in, and what is known of those in a stage. Decides nothing of who runs:
`scheduler.py` says what goes where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter

from bdh_batch.scheduler.backlog import Backlog
from bdh_batch.scheduler.groups import Groups
from bdh_batch.scheduler.policy import Counts
from bdh_batch.scheduler.rank import BEGAN, DUE
from bdh_batch.scheduler.ranking import Ranking
from bdh_batch.scheduler.sequence import HOLDING, WAITING, Sequence, Stage
from bdh_batch.scheduler.sharing import Sharing
from bdh_batch.scheduler.slot_allocator import SlotAllocator


class Stages:
    """Holds all sequences that have not ended.

    Args:
        allocator: it is told which swapped ones still have their slots on the device.
        sharing: it is told which ones no longer wait for a prefix.
        counts: with the number of the present step.
        queue_unit: tokens of a prompt that fill the queue as another sequence does.
    """

    def __init__(self, allocator: SlotAllocator, sharing: Sharing, counts: Counts, queue_unit: int) -> None:
        self.groups = {stage: Groups(BEGAN if stage is Stage.RUNNING else DUE) for stage in WAITING + HOLDING}
        self.backlog = Backlog(queue_unit)  # of those that wait for their first slot, or another one
        self.prompts: dict[Sequence, None] = {}  # that run; one that has become a stream goes when next looked at
        self._swapped_prompts: dict[Sequence, None] = {}
        self.watching = 0  # that run, and whose tokens' neurons are shown
        self.ageing: Ranking[Sequence] = Ranking(attrgetter("standing.served_at"))  # those that have not aged
        self._allocator = allocator
        self._sharing = sharing
        self._counts = counts
        self._changes: dict[Sequence, int] = {}  # which sequences wait now, and did not when last asked: 1, or -1

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self.groups.values())

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    @property
    def priorities(self) -> set[int]:
        """Those of all sequences."""
        return {each for group in self.groups.values() if group.priorities for each, _ in group.priorities}

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are still to be computed of the prompts that run or are swapped. Any thread may ask."""
        prompts = [*self.prompts, *self._swapped_prompts]
        return sum(max(0, len(sequence.prompt) - sequence.computed) for sequence in prompts)

    def in_prompt(self) -> dict[Sequence, None]:
        """Those that run and are in their prompts, in the order in which they began."""
        if self.prompts:
            self.prompts = {sequence: None for sequence in self.prompts if not sequence.decodes}
        return self.prompts

    def take_changes(self) -> dict[Sequence, int]:
        """Returns the sequences that wait since the last call (1), and those that no longer wait (-1)."""
        changes, self._changes = self._changes, {}
        return changes

    def age(self, sequence: Sequence) -> None:
        """From now on `sequence` competes in the first priority, until it gives its slot up."""
        self.ageing.drop(sequence)
        self.groups[sequence.stage].remove(sequence)
        sequence.standing.aged = True
        self.groups[sequence.stage].push(sequence)

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """The states of `sequences`, which run or are swapped, are lost: they stay there, and are computed again."""
        for sequence in sequences:
            sequence.restart()
            (self.prompts if sequence.stage is Stage.RUNNING else self._swapped_prompts)[sequence] = None

    def move(self, sequence: Sequence, stage: Stage) -> None:
        """Takes `sequence` out of the stage that it is in, and puts it into another one."""
        before, sequence.stage = sequence.stage, stage
        if before in self.groups:
            self.groups[before].remove(sequence)
        self._allocator.parked.pop(sequence, None)
        if before is Stage.AWAITING_PREFIX:
            self._sharing.stop_waiting(sequence)
        elif before is Stage.AWAITING_STATE:
            self._allocator.transfers.stop_waiting(sequence)
        self._swapped_prompts.pop(sequence, None)
        if stage is Stage.SWAPPED:
            sequence.standing.due = self._allocator.now
            self._allocator.parked[sequence] = None
            if sequence.computed < len(sequence.prompt):
                self._swapped_prompts[sequence] = None
        if Stage.RUNNING in (before, stage):
            self._run(sequence, 1 if stage is Stage.RUNNING else -1)
        if stage is Stage.ENDED:
            self.ageing.drop(sequence)
        elif before in (Stage.NEW, Stage.RUNNING):
            sequence.standing.aged = False
            self.ageing.put(sequence)
        if stage in self.groups:
            self.groups[stage].push(sequence)
        self._count(sequence, (stage in WAITING) - (before in WAITING), (stage in HOLDING) - (before in HOLDING))

    def _run(self, sequence: Sequence, change: int) -> None:
        """It runs from now on (1), or does not any longer (-1)."""
        sequence.standing.since, sequence.standing.steps = self._counts.steps, 0
        sequence.decoding = None  # its next slot may be another one
        self.watching += change * sequence.watches
        self.prompts.pop(sequence, None)
        if change > 0 and not sequence.decodes:
            self.prompts[sequence] = None

    def _count(self, sequence: Sequence, waits: int, holds: int) -> None:
        sequence.standing.account.count(waits, holds)
        if waits:
            (self.backlog.add if waits > 0 else self.backlog.remove)(sequence)
            if not self._changes.pop(sequence, 0):
                self._changes[sequence] = waits
