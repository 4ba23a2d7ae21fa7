"""Builds the batch of a step: which of the sequences that run are in it, and with how many tokens.

The rank (`rank.py`) is walked forwards until the step's time is full. A stream, a sequence that decodes or makes latent
steps, takes one token, and a prompt as many as are left. So the prompt of a tenant with less virtual time goes before
the streams of one with more, which fill the rest of the time. Inside a tenant streams go before prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Sequences, Set
from heapq import nsmallest
from typing import NamedTuple

from bdh_batch.messages import Plan
from bdh_batch.scheduler.copies import Save
from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.groups import Groups
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.rank import DUE
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.steady import Steady
from bdh_batch.scheduler.step_size import LEAST_PREFILL, StepSize

NO_LIMIT = 2**62  # seconds, or sequences
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
        policy: how long it should take, and of how many tokens it may show neurons.
    """

    def __init__(self, size: StepSize, policy: Policy) -> None:
        self.cost = StepCost()
        self._size = size
        self._policy = policy
        self._passed_over = False  # whether the last step had prompts, and left streams out
        self._steady = Steady()

    def build(
        self, running: Groups, prompts: set[Sequence], watching: int, first: float, allocator: SlotAllocator
    ) -> Step | None:
        """The next step of those `running`, all but `prompts` of them streams, with the copies that are planned; None
        where it would be empty. Of so many that are `watching` the neurons are shown. `first` is the first priority."""
        copies, saves = allocator.copies.take()
        filling = self._fill(running, prompts, watching, first, allocator.copies.busy)
        sequences = filling.streams
        segments, steady = self._steady.segments(sequences, keep=not watching)
        if filling.prompts:
            steady = 0
            sequences = [*sequences, *filling.prompts]
            segments = [*segments, *(prompt.segment(tokens) for prompt, tokens in filling.prompts.items())]
        if not (segments or copies or allocator.released):
            return None
        watches = watching > 0 and any(segment.watch for segment in segments)
        plan = Plan(segments, copies, allocator.released, watches, steady)
        return Step(plan, sequences, len(filling.streams), filling.prompt_tokens, allocator.now, saves)

    def forget(self) -> None:
        """Keeps nothing of the last step, with what its requests hold."""
        self._steady = Steady()

    def computed(self, step: Step, seconds: float) -> None:
        """Learns from a step that took so many seconds, and did not run out of memory."""
        if step.sequences:  # else nothing was computed
            self._size.succeeded()
            self.cost.observe(step.decodes, step.prefill_tokens, seconds)

    def _fill(self, running: Groups, prompts: set[Sequence], watching: int, first: float, busy: Set[int]) -> Filling:
        """What the step has of those, in the order of their ranks, until its time is full. Those whose slots are `busy`
        wait for copies."""
        waiting = {sequence for sequence in running if sequence.slot in busy} if busy else set()
        shown = NO_LIMIT
        if watching:
            left_out, shown = _watched(running, prompts, waiting, self._policy.most_watched)
            waiting |= left_out
        apart = prompts | waiting
        decoding = len(running) - len(apart)
        filling = Filling(self.cost, self._size.prefill, self._policy, decoding, shown)
        if not apart and decoding <= filling.room:
            filling.streams = self._steady.streams(running)  # as mostly: in which order they go makes no difference
        else:
            ready, walk = prompts - waiting, [members for _, members in running.forwards(first)]
            streams_first = self._passed_over or not filling.splits  # all of them, before all prompts
            for members in walk:
                filling.decode([sequence for sequence in members if sequence not in apart])
                if not streams_first:
                    filling.prefill(ready.intersection(members))
            for members in walk if streams_first else []:
                filling.prefill(ready.intersection(members))
        passed_over = bool(filling.prompts) and len(filling.streams) < decoding
        self._passed_over = self._policy.guards.alternate and passed_over
        return filling


def _watched(running: Groups, prompts: set[Sequence], waiting: set[Sequence], most: int) -> tuple[set[Sequence], int]:
    """Who is left out for the neurons of at `most` so many tokens to be shown, the last to be due, and of how many
    tokens each prompt may show them."""
    watched = {sequence for sequence in running if sequence.watches} - waiting
    within = set(nsmallest(most, watched, key=DUE))
    prompting = len(within & prompts)
    return watched - within, (most - len(within) + prompting) // max(1, prompting)


class Filling:
    """The time and the prompt tokens of one step while they are given out.

    Args:
        budget: most prompt tokens.
        policy: how many seconds it should take if streams are in it.
        streams: how many there are.
        shown: most tokens of a prompt whose neurons are shown.
    """

    def __init__(self, cost: StepCost, budget: int, policy: Policy, streams: int, shown: int) -> None:
        self.streams: list[Sequence] = []
        self.prompts: dict[Sequence, int] = {}  # with their tokens
        self.prompt_tokens = 0
        self._to_come = streams  # those that have not been offered their token yet
        self._budget = budget
        self._shown = shown
        self._target = (policy.target_step if streams else 0.0) or NO_LIMIT
        self._guards = policy.guards
        self._base, self._stream, self._token = cost.base, cost.stream or 0.0, cost.prompt_token or FREE
        # May leave streams out.
        self.splits = self._stream > 0 and self._base <= self._guards.little * self._target

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
        if (room := self.room) < len(streams):
            streams = nsmallest(room, streams, key=DUE)
        self.streams += streams

    def prefill(self, prompts: Iterable[Sequence]) -> None:
        """Gives each of `prompts` what is left, the first to be due first."""
        decoding = self._decoding
        for prompt in sorted(prompts, key=DUE):
            if self.prompt_tokens == (most := self._budget):
                return
            finished = decoding + self._token * (self.prompt_tokens + prompt.pending)
            if not (self._to_come and finished <= self._guards.finished * self._target):
                seconds = max(self._target - decoding, self._guards.least_share * decoding)
                most = min(most, max(int(seconds / self._token), LEAST_PREFILL))
            tokens = min(prompt.until_cut, most - self.prompt_tokens, prompt.unwatched + self._shown)
            if tokens > 0:
                self.prompts[prompt] = tokens
                self.prompt_tokens += tokens

    @property
    def _decoding(self) -> float:
        """Seconds of the step without prompts."""
        return self._base + self._stream * len(self.streams)
