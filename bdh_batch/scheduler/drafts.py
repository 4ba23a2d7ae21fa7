"""Drafts: tokens that a sequence is likely to go on with, as its text went on so before. They are computed in the same
step as its next token, and those that come true spare it a step each. Decides how many; finds them in `ngrams.py`.

A draft token makes the step longer, for all that are in it. So streams have drafts only where each of them is expected
to get more tokens in the longer step than it loses time. What a draft token takes, and how often one comes true, is
measured.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from bdh_batch.messages import Outcome, Plan, Segment
from bdh_batch.scheduler.cost import StepCost
from bdh_batch.scheduler.drafter import Drafter
from bdh_batch.scheduler.ngrams import Ngrams
from bdh_batch.scheduler.sequence import Sequence

STREAMS = 32  # in a step; with more, each draft costs too much
GUESS = 0.5  # of the time of a step of one stream, for a draft token, as long as none was measured
SMOOTH = 0.1  # the weight of one more step in what a draft token takes
FADE = 0.998  # of that, in each step without drafts: it may take less by now
MARGIN = 1.15  # how much more a draft is to bring than it takes


@dataclass(frozen=True, slots=True)
class DraftPolicy:
    """How drafts are made.

    Args:
        most: tokens of a draft; 0 makes none.
        least_match: last tokens of a sequence that must have been there before.
        block: tokens of a block of the attention window, of which a draft does not begin one; 0 is no window.
        step: tokens of all segments in a step that has drafts.
    """

    most: int = 0
    least_match: int = 8
    block: int = 0
    step: int = 256


NO_DRAFTS = DraftPolicy()


@dataclass(slots=True)
class DraftCounts:
    """Counts since the start, as vLLM has them."""

    drafts: int = 0
    tokens: int = 0
    accepted: int = 0


class Drafts:
    """Gives the segments of a step their drafts, and learns from what becomes of them."""

    def __init__(self, policy: DraftPolicy, cost: StepCost) -> None:
        self.counts = DraftCounts()
        self._policy = policy
        self._cost = cost
        self._each: float | None = None  # seconds that a draft token takes

    def propose(self, streams: Sequences[Sequence], segments: Sequences[Segment]) -> int:
        """Gives the segments of `streams`, which are all that is in the step, their drafts; returns their tokens."""
        if not self._policy.most or not 0 < len(streams) <= STREAMS or not self._cost.known:
            return 0
        seconds = self._cost.seconds(len(streams), 0)
        each = seconds * GUESS / len(streams) if self._each is None else self._each
        least = MARGIN * each * len(streams) / seconds if seconds > 0 else 1.0
        gains, tokens, found = [], 0, []
        for sequence, segment in zip(streams, segments):
            gain, draft = self._draft(sequence, segment, least, self._policy.step // len(streams) - 1)
            gains.append(gain)
            found.append(draft)
            tokens += len(draft)
        if not tokens or min(gains) * seconds < each * tokens:
            self._forget(streams)
            return 0
        for segment, draft in zip(segments, found):
            segment.draft = draft
        return tokens

    def computed(self, plan: Plan, streams: int, seconds: float) -> None:
        """Learns what drafts take, from a step of so many streams that took so many seconds."""
        alone = self._cost.seconds(streams, 0)
        each, known = max(0.0, seconds - alone) / plan.drafts, self._each or GUESS * alone / streams
        self._each = known + SMOOTH * (min(each, 4 * known) - known)  # one that took far longer says little

    def verify(self, sequences: Sequences[Sequence], plan: Plan, outcome: Outcome) -> None:
        """Learns from what became of a step's drafts, before its tokens are taken."""
        if not plan.drafts:
            return
        for row, (sequence, segment) in enumerate(zip(sequences, plan.segments)):
            if tried := len(segment.draft):
                true = len(outcome.more.get(row, ()))
                self.counts.drafts += 1
                self.counts.tokens += tried
                self.counts.accepted += true
                if (drafter := sequence.drafter) is not None:
                    drafter.rates.learn(drafter.ngrams.matched, true, tried)

    def _draft(self, sequence: Sequence, segment: Segment, least: float, most: int) -> tuple[float, Sequences[int]]:
        """A draft of `most` tokens for `sequence`, each of which comes true by `least` at least, and how many are
        expected to."""
        if not self.may_have(sequence, segment):
            return 0.0, ()
        drafter = sequence.drafter
        if drafter is None:
            known = len(sequence.prompt) + sequence.completion.max_tokens
            drafter = sequence.drafter = Drafter(Ngrams(self._policy.least_match, known))
        if not drafter.ngrams.follow(sequence.prompt, sequence.generated):
            return 0.0, ()
        rates, matched = drafter.rates, drafter.ngrams.matched
        draft = self._without_end(sequence, drafter.ngrams.draft(min(most, self.longest(sequence, segment))))
        count, gain, chance = 0, 0.0, 1.0
        while count < len(draft) and (chance := chance * rates.of(matched + count)) >= least:
            count += 1
            gain += chance
        return gain, draft[:count]

    def may_have(self, sequence: Sequence, segment: Segment) -> bool:
        """Whether a sequence can have drafts in a segment."""
        plain = segment.sampling is not None and len(segment.tokens) == 1 and not segment.watch
        return plain and sequence.save_to is None and sequence.completion.takes_drafts

    def longest(self, sequence: Sequence, segment: Segment) -> int:
        """Tokens of the longest draft that it can have."""
        most = min(self._policy.most, sequence.completion.max_tokens - len(sequence.generated) - 1)
        if block := self._policy.block:
            most = min(most, block - 1 - segment.start % block)
        return most

    def _without_end(self, sequence: Sequence, draft: list[int]) -> list[int]:
        """Up to a token that would end the completion: nothing comes behind it, and it does not enter the state."""
        ends = sequence.completion.stop_token_ids
        return next((draft[:at] for at, token in enumerate(draft) if token in ends), draft)

    def _forget(self, streams: Sequences[Sequence]) -> None:
        """No draft was tried: what did not pay may pay by now, as the machine and the texts change."""
        if self._each is not None:
            self._each *= FADE
        for sequence in streams:
            if (drafter := sequence.drafter) is not None and drafter.ngrams.matched:
                drafter.rates.revive(drafter.ngrams.matched)
