"""Builds the batch of a step: which of the sequences that run are in it, and with how many tokens.

The rank (`rank.py`) is walked forwards until the step's time is full. A stream, a sequence that decodes or makes latent
steps, takes one token, and a prompt as many as are left. So the prompt of a tenant with less virtual time goes before
the streams of one with more, which fill the rest of the time. Inside a tenant streams go before prompts.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences, Set
from heapq import nsmallest
from typing import NamedTuple

from bdh_batch.messages import Plan
from bdh_batch.scheduler.copies import Save
from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.groups import Groups
from bdh_batch.scheduler.policy import Guards
from bdh_batch.scheduler.rank import DUE
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.steady import Steady
from bdh_batch.scheduler.step_size import LEAST_PREFILL, StepSize

NO_LIMIT = 2**62  # seconds, or sequences
Members = list[Sequence]
FREE = 1e-9  # seconds of a prompt token, as long as it is not known what it takes


class Step(NamedTuple):
    """A plan for the runner, and the sequences of its segments."""

    plan: Plan
    sequences: list[Sequence]
    decodes: int
    prefill_tokens: int
    planned: float  # seconds on the worker's clock
    saves: Sequences[Save] = ()  # of states whose copies, on their way to files, are made with it


class BatchBuilder:
    """Builds the batch of each step from the running sequences.

    Args:
        size: what a step may take.
        target: seconds that a step with streams should take; 0 is no limit.
        guards: bounds on what the rank alone would do.
        most_watched: tokens in a step whose neurons are shown.
    """

    def __init__(self, size: StepSize, target: float, guards: Guards, most_watched: int) -> None:
        self.cost = StepCost()
        self._size = size
        self._target = target or NO_LIMIT
        self._guards = guards
        self._most_watched = most_watched
        self._passed_over = False  # whether the last step had prompts, and left streams out
        self._steady = Steady()

    def build(
        self, running: Groups, prompts: set[Sequence], watching: int, first: float, allocator: SlotAllocator
    ) -> Step | None:
        """The next step of those `running`, all but `prompts` of them streams, with the copies that are planned; None
        where it would be empty. Of so many that are `watching` the neurons are shown. `first` is the first priority."""
        copies, saves = allocator.copies.take()
        if not (prompts or watching or copies or allocator.released or allocator.copies.busy):
            filling = Filling(self.cost, 0, self._target, self._guards, len(running))
            if 0 < len(running) <= filling.room and (found := self._steady.streams(running)) is not None:
                self._passed_over = False
                return Step(Plan(found[0]), found[1], len(running), 0, allocator.now)
        self._steady.forget()
        filling = self._fill(running, prompts, watching, first, allocator.copies.busy)
        segments = [stream.decoding or stream.decode_segment() for stream in filling.streams]
        segments += [prompt.segment(tokens) for prompt, tokens in filling.prompts]
        watches = watching > 0 and any(segment.watch for segment in segments)
        plan = Plan(segments, copies, allocator.released, watches)
        if not (segments or plan.copies or plan.releases):
            return None
        sequences = [*filling.streams, *(prompt for prompt, _ in filling.prompts)]
        return Step(plan, sequences, len(filling.streams), filling.prompt_tokens, allocator.now, saves)

    def computed(self, step: Step, seconds: float) -> None:
        """Learns from a step that took so many seconds, and did not run out of memory."""
        if step.sequences:  # else nothing was computed
            self._size.succeeded()
            self.cost.observe(step.decodes, step.prefill_tokens, seconds)

    def _fill(self, running: Groups, prompts: set[Sequence], watching: int, first: float, busy: Set[int]) -> Filling:
        """What the step has of those, in the order of their ranks, until its time is full. Those whose slots are `busy`
        wait for copies."""
        waiting = {sequence for sequence in running if sequence.slot in busy} if busy else set()
        for sequence in waiting:
            sequence.standing.copying += 1
        apart = prompts | waiting
        decoding = len(running) - len(apart)
        target = self._target if decoding else NO_LIMIT
        filling = Filling(self.cost, self._size.prefill, target, self._guards, decoding)
        if watching:
            filling.watched = self._most_watched
            filling.kept = max(1, self._most_watched // 4) if any(prompt.watches for prompt in prompts) else 0
        if not apart and decoding <= filling.room and watching <= self._most_watched:
            filling.decode([*running])  # as mostly: in which order they go makes no difference
        else:
            walk = [_parted(members, apart, waiting) for _, members in running.forwards(first)]
            if self._passed_over or not filling.splits:  # all streams go before all prompts
                walk = [*((streams, []) for streams, _ in walk), *(([], own) for _, own in walk)]
            for streams, own in walk:
                filling.decode(streams)
                for prompt in own:
                    filling.prefill(prompt)
        self._passed_over = self._guards.alternate and bool(filling.prompts) and len(filling.streams) < decoding
        return filling


def _parted(members: Members, apart: set[Sequence], waiting: set[Sequence]) -> tuple[Members, Members]:
    """Those of one tenant that decode, and of those `apart` the prompts, the first to be due first: those that are not
    `waiting`."""
    own = apart.intersection(members)
    return [sequence for sequence in members if sequence not in own] if own else members, sorted(own - waiting, key=DUE)


class Filling:
    """The time and the prompt tokens of one step while they are given out.

    Args:
        budget: most prompt tokens.
        target: seconds.
        streams: how many there are.
    """

    def __init__(self, cost: StepCost, budget: int, target: float, guards: Guards, streams: int) -> None:
        self.streams: list[Sequence] = []
        self.watched: int | None = None  # how many more tokens' neurons may be shown; None where none are
        self.kept = 0  # of them, for prompts
        self.prompts: list[tuple[Sequence, int]] = []  # with their tokens
        self.prompt_tokens = 0
        self._to_come = streams  # those that have not been offered their token yet
        self._budget = budget
        self._target = target
        self._guards = guards
        self._base, self._stream, self._token = cost.base, cost.stream or 0.0, cost.prompt_token or FREE
        self.splits = self._stream > 0 and self._base <= guards.little * target  # may leave streams out

    @property
    def room(self) -> int:
        """How many more streams there is time for."""
        if not self.splits:
            return NO_LIMIT
        least = 0 if self.prompts else self._guards.least_width - len(self.streams)
        left = self._target - self._decoding - self._token * self.prompt_tokens
        return max(0, least, int(left / self._stream))

    def decode(self, streams: list[Sequence]) -> None:
        """Takes those that there is time for, of them those whose last token is the oldest."""
        self._to_come -= len(streams)
        if self.watched is not None:
            streams = self._watchable(streams, max(0, self.watched - self.kept))
        if (room := self.room) < len(streams):
            streams = nsmallest(room, streams, key=DUE)
        self.streams += streams

    def prefill(self, prompt: Sequence) -> None:
        """Gives `prompt` what is left."""
        if self.prompt_tokens == self._budget:
            return
        most, decoding = self._budget, self._decoding
        finished = decoding + self._token * (self.prompt_tokens + prompt.pending)
        if not (self._to_come and finished <= self._guards.finished * self._target):
            seconds = max(self._target - decoding, self._guards.least_share * decoding)
            most = min(most, max(int(seconds / self._token), LEAST_PREFILL))
        tokens = min(prompt.until_cut, most - self.prompt_tokens)
        if self.watched is not None and prompt.watches:
            tokens = min(tokens, prompt.unwatched + self.watched)
            self.watched -= max(0, tokens - prompt.unwatched)
        if tokens > 0:
            self.prompts.append((prompt, tokens))
            self.prompt_tokens += tokens

    def _watchable(self, streams: list[Sequence], most: int) -> list[Sequence]:
        """Without those whose tokens' neurons are shown that are more than `most`; the oldest last tokens go first."""
        watched = [stream for stream in streams if stream.watches]
        chosen = nsmallest(most, watched, key=DUE) if most < len(watched) else watched
        self.watched = (self.watched or 0) - len(chosen)
        if chosen is watched:
            return streams
        return [stream for stream in streams if not stream.watches] + chosen

    @property
    def _decoding(self) -> float:
        """Seconds of the step without prompts."""
        return self._base + self._stream * len(self.streams)
