"""Builds the batch of a step: which of the sequences that run are in it, and with how many tokens.

The rank (`rank.py`) is walked forwards until the step's time is full. A stream, a sequence that decodes, takes one
token, and a prompt as many as are left. So the prompt of a tenant with less virtual time goes before the streams of one
with more, which fill the rest of the time. Inside a tenant streams go before prompts.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from bdh_batch.messages import Plan
from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.rank import RANK, TENANT_RANK
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.step_size import LEAST_PREFILL, StepSize

# Guards. docs/scheduling.md says which figure of benchmarks/results/simulate.json fails without each of them.
LEAST_SHARE = 0.25  # of the time of a step without prompts, that prompts get after the streams before them
LEAST_WIDTH = 64  # streams in any step, if no prompt goes before them
FINISHED = 2.0  # times a step's time, for a prompt that goes before streams and is finished by it
LITTLE = 0.1  # of a step's time: where a step costs more by itself, no stream is left out

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
    """

    def __init__(self, size: StepSize, target: float) -> None:
        self.cost = StepCost()
        self._size = size
        self._target = target
        self._passed_over = False  # by the last step, streams for a prompt

    def build(self, running: list[Sequence], allocator: SlotAllocator, now: float) -> Step | None:
        """The next step of those `running`, with the copies that are planned; None where it would be empty."""
        streams: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in running:
            is_stream = len(sequence.prompt) + len(sequence.generated) - sequence.computed == 1
            (streams if is_stream else prompts).append(sequence)
        filling = self._walk(streams, prompts)
        segments = [stream.decode_segment() for stream in filling.streams]
        segments += [prompt.segment(tokens) for prompt, tokens in filling.prompts]
        plan = Plan(segments, allocator.copies, allocator.released)
        if not (segments or plan.copies or plan.releases):
            return None
        fresh = sum(not stream.generated for stream in filling.streams)  # the last token of a prompt
        sequences = [*filling.streams, *(prompt for prompt, _ in filling.prompts)]
        decodes = len(filling.streams) - fresh
        return Step(plan, sequences, allocator.moved, decodes, filling.prompt_tokens + fresh, now)

    def computed(self, step: Step, seconds: float) -> None:
        """`step` took so long, and had memory enough."""
        if not step.sequences:  # nothing was computed
            return
        self._size.succeeded()
        self.cost.observe(step.decodes, step.prefill_tokens, seconds)

    def _walk(self, streams: list[Sequence], prompts: list[Sequence]) -> Filling:
        """What the step has of those, in the order of their ranks, until its time is full."""
        filling = Filling(self.cost, self._size.prefill, self._target if streams else 0.0)
        streams_first = self._passed_over or not filling.splits
        if filling.splits and (prompts or filling.room_for_streams < len(streams)):
            streams.sort(key=RANK)
        at = 0
        for prompt in sorted(prompts, key=RANK):
            behind = len(streams) if streams_first else bisect_right(streams, TENANT_RANK(prompt), at, key=TENANT_RANK)
            filling.decode(streams[at:behind])
            filling.prefill(prompt, passes_over=behind < len(streams))
            at = behind
        filling.decode(streams[at:])
        self._passed_over = filling.passed_over
        return filling


class Filling:
    """The time and the prompt tokens of one step while they are given out.

    Args:
        budget: most prompt tokens.
        target: seconds; 0 is no limit.
    """

    def __init__(self, cost: StepCost, budget: int, target: float) -> None:
        self.streams: list[Sequence] = []
        self.prompts: list[tuple[Sequence, int]] = []  # with their tokens
        self.prompt_tokens = 0
        self.passed_over = False  # whether streams wait for a prompt
        self._budget = budget
        self._target = target
        self._stream = cost.stream or 0.0  # seconds, as far as they are known
        self._token = cost.prompt_token or 0.0
        self._base = cost.seconds(0, 0)
        self.splits = bool(target) and self._base <= LITTLE * target  # whether streams may be left to the next step

    @property
    def room_for_streams(self) -> int:
        """How many more there is time for."""
        least = 0 if self.prompts else LEAST_WIDTH - len(self.streams)
        return max(least, int((self._target - self._seconds) / self._stream)) if self._stream else NO_LIMIT

    def decode(self, streams: list[Sequence]) -> None:
        """Takes those that there is time for, the first ones first."""
        room = max(0, self.room_for_streams) if self.splits else NO_LIMIT
        self.passed_over |= len(streams) > room and bool(self.prompts)
        self.streams += streams[:room]

    def prefill(self, prompt: Sequence, passes_over: bool) -> None:
        """Gives `prompt` what is left; `passes_over`: whether streams come after it."""
        tokens = min(prompt.pending, self._budget - self.prompt_tokens, self._room(prompt.pending, passes_over))
        cut = next((at for at in prompt.prefix.cuts if at > prompt.computed), None)
        if cut is not None:
            tokens = min(tokens, cut - prompt.computed)
        if tokens > 0:
            self.prompts.append((prompt, tokens))
            self.prompt_tokens += tokens

    def _room(self, pending: int, passes_over: bool) -> int:
        """Prompt tokens that there is time for."""
        if not (self._target and self._token):
            return self._budget
        left = self._target - self._seconds
        if passes_over and pending * self._token <= left + (FINISHED - 1) * self._target:
            return pending
        least = LEAST_SHARE * (self._base + self._stream * len(self.streams)) - self._token * self.prompt_tokens
        return max(int(max(left, least) / self._token), LEAST_PREFILL - self.prompt_tokens)

    @property
    def _seconds(self) -> float:
        return self._base + self._stream * len(self.streams) + self._token * self.prompt_tokens
