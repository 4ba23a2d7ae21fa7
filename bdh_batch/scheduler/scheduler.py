"""Decides what each step computes, and takes in what came of it. Pure: no thread, no clock, no tensor.

A sequence waits, then runs in a slot, then is gone. Waiting ones get free slots first come, first served. In a step
every sequence that decodes gets its one token; those still in their prompts share a budget, shorter remainders first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from bdh_batch.errors import BDHError
from bdh_batch.messages import Delta, FinishReason, Outcome, Plan
from bdh_batch.scheduler.sequence import Sequence

Update = tuple[Sequence, Delta]


@dataclass(frozen=True, slots=True)
class Step:
    """A plan for the runner, and whose its segments are."""

    plan: Plan
    sequences: list[Sequence]


class Scheduler:
    """
    Args:
        slots: how many sequences can run at a time.
        prefill_tokens: most prompt tokens in a step, of all sequences together.
    """

    def __init__(self, slots: int, prefill_tokens: int) -> None:
        self.slots = slots
        self._prefill_tokens = prefill_tokens
        self._free = list(reversed(range(slots)))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def submit(self, sequences: Iterable[Sequence]) -> list[Update]:
        self._waiting.extend(sequences)
        return []

    def abort(self, sequences: Iterable[Sequence]) -> list[Update]:
        """Ends those of `sequences` that have not ended; nothing more is computed for them."""
        updates = []
        for sequence in sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = FinishReason.ABORT
                updates.append((sequence, Delta(finish_reason=FinishReason.ABORT)))
        self._sweep()
        return updates

    def fail_all(self, error: BDHError) -> list[Update]:
        return self._fail([*self._waiting, *self._running], error)

    def fail(self, step: Step, error: BDHError) -> list[Update]:
        """The step could not be computed: ends the sequences in it, whose states are no longer known."""
        return self._fail(step.sequences, error)

    def plan(self, now: float) -> Step | None:
        """The next step, or None where nothing can run."""
        self._admit(now)
        sequences = [sequence for sequence in self._running if sequence.pending == 1]
        segments = [sequence.segment(1) for sequence in sequences]
        prefilling = sorted((s for s in self._running if s.pending > 1), key=lambda s: s.pending)
        budget = self._prefill_tokens
        for place, sequence in enumerate(prefilling):
            if budget == 0:
                break
            others = len(prefilling) - place - 1  # a token for each of them is kept back
            tokens = min(sequence.pending, max(1, budget - others))
            segments.append(sequence.segment(tokens))
            sequences.append(sequence)
            budget -= tokens
        return Step(Plan(segments), sequences) if segments else None

    def commit(self, step: Step, outcome: Outcome, now: float) -> list[Update]:
        """Takes in what a step drew; those that ended are out of their slots."""
        updates = []
        for sequence, segment, token in zip(step.sequences, step.plan.segments, outcome.drawn, strict=True):
            sequence.computed += len(segment.tokens)
            if segment.sampling is not None:
                updates.append((sequence, sequence.accept(token, now)))
        self._sweep()
        return updates

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold."""
        held = [-1 if sequence.slot is None else sequence.slot for sequence in self._running]
        assert sorted([*self._free, *held]) == list(range(self.slots)), "every slot is free or held, once"
        assert all(sequence.slot is None for sequence in self._waiting), "who waits holds no slot"
        assert all(s.finish_reason is None and s.pending >= 1 for s in self._running), "who runs has work"

    def _admit(self, now: float) -> None:
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot, sequence.scheduled = self._free.pop(), now
            self._running.append(sequence)

    def _fail(self, sequences: Iterable[Sequence], error: BDHError) -> list[Update]:
        updates = [(sequence, sequence.fail(error)) for sequence in sequences]
        self._sweep()
        return updates

    def _sweep(self) -> None:
        """Takes out all that have ended."""
        ended = [sequence for sequence in self._running if sequence.finish_reason is not None]
        self._free.extend(sequence.slot for sequence in ended if sequence.slot is not None)
        if ended:
            self._running = [sequence for sequence in self._running if sequence.finish_reason is None]
        if any(sequence.finish_reason is not None for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if sequence.finish_reason is None)
