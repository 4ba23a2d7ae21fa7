"""Deals a step: which of those that run are in it, and with how many tokens.

Every sequence that decodes gets its one token, as far as the step's time goes; those still in their prompts share what
that leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from bdh_batch.messages import Plan
from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.fair_queue import NOTHING, Account
from bdh_batch.scheduler.places import Places
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.step_size import LEAST_PREFILL, StepSize

RANK = attrgetter("rank")

OLDEST = 8  # the oldest prompt gets an eighth of a step's prompt tokens for certain
UNKNOWN = 1.0  # seconds that a prompt token takes, as long as that is not known: shorter ones come first
LEAST_SHARE = 0.25  # prompt tokens may always take so much of the time of those that decode
LITTLE = 0.1  # of a step's time, up to which what it costs by itself does not keep it from being a short one
LEAST_WIDTH = 64  # sequences that decode in a step whatever it may take: fewer would be slower altogether
EXPRESS = 2.0  # times a step's time may take the one for which many step aside, as the next one is theirs
MANY = 8  # places; a key that holds more steps aside for the first token of one that held none
BRIEF = 0.25  # of a step's time, for the step after which one is likely to ask again


@dataclass(frozen=True, slots=True)
class Step:
    """A plan for the runner, whose its segments are, and what else its copies touch."""

    plan: Plan
    sequences: list[Sequence]
    moved: list[Sequence]
    decodes: int
    prefill_tokens: int
    planned: float  # seconds on the worker's clock


def had_by_many(running: list[Sequence]) -> float | None:
    """What the keys that hold many places have had, the least of them; None where there is none such."""
    return min((s.account.had for s in running if s.account.seats > MANY), default=None)


class Dealer:
    """
    Args:
        size: what a step may take.
        target: seconds that a step with sequences that decode should take; 0 is as much prefill as there is.
    """

    def __init__(self, size: StepSize, target: float) -> None:
        self.cost = StepCost()
        self._size = size
        self._target = target
        self._was_express = self._was_brief = False  # the last step
        self._awaited: Account | None = None  # which was answered a moment ago, and may ask again

    def deal(self, running: list[Sequence], places: Places, now: float) -> Step | None:
        """The next step of those `running`, with the copies that are planned; None where it would be empty."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in running:
            one = len(sequence.prompt) + len(sequence.generated) - sequence.computed == 1
            (decoding if one else prefilling).append(sequence)
        held_back = 0
        if express := self._express(prefilling, running):
            every, decoding = len(decoding), [s for s in decoding if s.account.seats <= MANY]
            prefilling, held_back = express, every - len(decoding)
        self._was_express = bool(express)
        target = self._time(running)
        decoding = self._in_time(decoding, target)
        segments = [sequence.turn() for sequence in decoding]
        fresh = sum(not sequence.generated for sequence in decoding)
        decodes = len(decoding)
        prefill_tokens = 0
        if prefilling:
            for sequence, tokens in self._shares(prefilling, self._budget(target, decodes, held_back)):
                decoding.append(sequence)
                segments.append(sequence.segment(tokens))
                prefill_tokens += tokens
        plan = Plan(segments, places.copies, places.released)
        if not (segments or plan.copies or plan.releases):
            return None
        return Step(plan, decoding, places.moved, decodes - fresh, prefill_tokens + fresh, now)

    def await_next(self, account: Account) -> None:
        """It has been answered all it asked for, and may ask again at once."""
        self._awaited = account

    def computed(self, step: Step, seconds: float) -> None:
        """`step` took so long, and had memory enough."""
        if not step.sequences:  # nothing was computed
            return
        self._size.succeeded()
        self.cost.observe(step.decodes, step.prefill_tokens, seconds)

    def _express(self, prefilling: list[Sequence], running: list[Sequence]) -> list[Sequence]:
        """Short prompts of keys that hold nothing else, and have not had more, have a step without the keys that hold
        many places, unless those are of an earlier class. Never two on end."""
        if not prefilling or self._was_express or (had := had_by_many(running)) is None:
            return []
        first = min(map(RANK, running))
        short = (s for s in prefilling if s.account.seats == 1 and s.pending <= self._size.prefill)
        return [s for s in short if s.rank == first and s.account.had <= had + NOTHING]

    def _time(self, running: list[Sequence]) -> float:
        """Seconds for this step. Who asks one thing after another comes when a step has just begun: where a key that
        holds many places, and has not had less, makes steps long, that one is brief. Never two on end."""
        awaited, self._awaited = self._awaited, None
        brief = False
        if awaited is not None and not self._was_brief and (had := had_by_many(running)) is not None:
            brief = awaited.had <= had + NOTHING
        self._was_brief = brief
        return BRIEF * self._target if self._was_brief else self._target

    def _in_time(self, decoding: list[Sequence], target: float) -> list[Sequence]:
        """As many as fit the time of a step, where a step costs little by itself: those of the first class, of these
        those whose last token is the oldest. The others have theirs in the next ones."""
        least = int(BRIEF * LEAST_WIDTH) if self._was_brief else LEAST_WIDTH
        if not target or len(decoding) <= least or self.cost.seconds(0, 0) > LITTLE * self._target:
            return decoding
        fitting = self.cost.decodes_within(target)
        if fitting is None or len(decoding) <= (width := max(least, fitting)):
            return decoding
        return sorted(decoding, key=lambda s: (s.rank, s.last_token or 0.0))[:width]

    def _budget(self, target: float, decodes: int, held_back: int) -> int:
        """Prompt tokens of this step; `held_back` are those that step aside for them."""
        if not (target and (decodes + held_back or self._was_brief)):
            return self._size.prefill
        decoding = self.cost.seconds(decodes + held_back, 0)
        target = EXPRESS * max(target, decoding) if held_back else max(target, (1 + LEAST_SHARE) * decoding)
        fitting = self.cost.prefill_budget(target, decodes)
        return self._size.prefill if fitting is None else min(self._size.prefill, max(LEAST_PREFILL, fitting))

    def _shares(self, prefilling: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """Who gets how many of `budget` prompt tokens. The oldest of the first class gets a part of them, so that none
        waits for ever; then the key that has had least comes first. Within a key a prompt is due some times what it
        takes alone after it came: shorter ones overtake a longer one, but not all that come after it. None gets a few
        tokens for their own sake, as those cost as much as many."""
        oldest = min(prefilling, key=lambda s: (s.rank, s.place))
        patience = OLDEST * (self.cost.prompt_token or UNKNOWN)
        order = sorted(prefilling, key=lambda s: (s.rank, s is oldest, s.account.had, s.arrived + patience * s.pending))
        reserve = max(1, budget // OLDEST)
        shares = []
        for sequence in order:
            reserve = 0 if sequence is oldest else reserve
            tokens = min(sequence.pending, budget - reserve)
            cut = next((at for at in sequence.cuts if at > sequence.computed), None)
            if cut is not None:
                tokens = min(tokens, cut - sequence.computed)
            if tokens > 0:
                shares.append((sequence, tokens))
                budget -= tokens
        return shares
