"""Builds the batch of a step: which of the sequences that run are in it, and with how many tokens.

The rank (`rank.py`) is walked forwards until the step's time is full. A stream, a sequence that decodes, takes one
token, and a prompt as many as are left. So the prompt of a tenant with less virtual time goes before the streams of one
with more, which fill the rest of the time. Inside a tenant streams go before prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nsmallest

from bdh_batch.messages import Plan
from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.policy import Guards
from bdh_batch.scheduler.rank import DUE, FIRST, RANK, TENANT_RANK
from bdh_batch.scheduler.running import Running
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.step_size import LEAST_PREFILL, StepSize

NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class Step:
    """A plan for the runner, the sequences of its segments, and those that its copies touch."""

    plan: Plan
    sequences: list[Sequence]
    moved: list[Sequence]
    decodes: int
    prefill_tokens: int
    planned: float  # seconds on the worker's clock


class BatchBuilder:
    """Builds the batch of each step from the running sequences.

    Args:
        size: what a step may take.
        target: seconds that a step with streams should take; 0 is no limit.
        guards: bounds on what the rank alone would do.
    """

    def __init__(self, size: StepSize, target: float, guards: Guards) -> None:
        self.cost = StepCost()
        self._size = size
        self._target = target
        self._guards = guards
        self._passed_over = False  # by the last step, streams for a prompt

    def build(self, running: Running, prompts: list[Sequence], allocator: SlotAllocator, now: float) -> Step | None:
        """The next step of those `running`, all but `prompts` of them streams, with the copies that are planned; None
        where it would be empty."""
        filling = self._walk(running, prompts)
        segments = [stream.decoding or stream.decode_segment() for stream in filling.streams]
        segments += [prompt.segment(tokens) for prompt, tokens in filling.prompts]
        plan = Plan(segments, allocator.copies, allocator.released)
        if not (segments or plan.copies or plan.releases):
            return None
        sequences = [*filling.streams, *(prompt for prompt, _ in filling.prompts)]
        return Step(plan, sequences, allocator.moved, len(filling.streams), filling.prompt_tokens, now)

    def computed(self, step: Step, seconds: float) -> None:
        """Learns from a step that took so many seconds, and did not run out of memory."""
        if step.sequences:  # else nothing was computed
            self._size.succeeded()
            self.cost.observe(step.decodes, step.prefill_tokens, seconds)

    def _walk(self, running: Running, prompts: list[Sequence]) -> Filling:
        """What the step has of those, in the order of their ranks, until its time is full."""
        apart = set(prompts)
        streams = [sequence for sequence in running if sequence not in apart]
        filling = Filling(self.cost, self._size.prefill, self._target if streams else 0.0, self._guards)
        fits = not prompts and len(streams) <= filling.room_for_streams
        if fits or not filling.splits:
            groups = [(FIRST, streams)]
        else:
            walked = ((rank, [s for s in members if s not in apart]) for rank, members in running.backwards())
            groups = [group for group in walked if group[1]]
        for prompt in sorted(prompts, key=RANK):
            if filling.prompt_tokens == self._size.prefill:
                break
            rank = TENANT_RANK(prompt)
            while groups and (self._passed_over or groups[-1][0] <= rank):
                filling.decode(groups.pop()[1])
            filling.prefill(prompt, passes_over=bool(groups))
        for _, group in reversed(groups):
            filling.decode(group)
        self._passed_over = filling.passed_over and self._guards.alternate
        return filling


class Filling:
    """The time and the prompt tokens of one step while they are given out.

    Args:
        budget: most prompt tokens.
        target: seconds; 0 is no limit.
    """

    def __init__(self, cost: StepCost, budget: int, target: float, guards: Guards) -> None:
        self.streams: list[Sequence] = []
        self.prompts: list[tuple[Sequence, int]] = []  # with their tokens
        self.prompt_tokens = 0
        self.passed_over = False  # whether streams wait for a prompt
        self._budget = budget
        self._target = target
        self._guards = guards
        self._base, self._stream, self._token = cost.seconds(0, 0), cost.stream or 0.0, cost.prompt_token or 0.0
        self.splits = bool(target and self._stream) and self._base <= guards.little * target  # may leave streams out

    @property
    def room_for_streams(self) -> int:
        """How many more there is time for."""
        if not self.splits:
            return NO_LIMIT
        least = 0 if self.prompts else self._guards.least_width - len(self.streams)
        left = self._target - self._decoding - self._token * self.prompt_tokens
        return max(0, least, int(left / self._stream))

    def decode(self, streams: list[Sequence]) -> None:
        """Takes those that there is time for, of them those whose last token is the oldest."""
        if (room := self.room_for_streams) < len(streams):
            self.passed_over |= bool(self.prompts)
            streams = nsmallest(room, streams, key=DUE)
        self.streams += streams

    def prefill(self, prompt: Sequence, passes_over: bool) -> None:
        """Gives `prompt` what is left; `passes_over`: whether streams come after it."""
        most = min(self._budget, self._time_for(prompt.pending, passes_over)) - self.prompt_tokens
        if (tokens := min(prompt.until_cut, most)) > 0:
            self.prompts.append((prompt, tokens))
            self.prompt_tokens += tokens

    def _time_for(self, pending: int, passes_over: bool) -> int:
        """The prompt tokens, those that were given out included, that there is time for."""
        if not (self._target and self._token):
            return NO_LIMIT
        finished = self._decoding + self._token * (self.prompt_tokens + pending)
        if passes_over and finished <= self._guards.finished * self._target:
            return NO_LIMIT
        seconds = max(self._target - self._decoding, self._guards.least_share * self._decoding)
        return max(int(seconds / self._token), LEAST_PREFILL)

    @property
    def _decoding(self) -> float:
        """Seconds of the step without prompts."""
        return self._base + self._stream * len(self.streams)
