"""A request on its way: what is known of its tokens, how far they have entered its state, when what happened."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import Enum
from math import isfinite
from typing import Protocol

from bdh_batch.errors import BDHError, GenerationFailed, InvalidRequest, NotFinite
from bdh_batch.messages import Adjustment, Constraint, Delta, FinishReason, SamplingParams, Segment, TokenScore
from bdh_batch.scheduler.alignment import Alignment
from bdh_batch.scheduler.prefix_cache import Entry
from bdh_batch.scheduler.tenants import Tenant

log = logging.getLogger(__name__)


QueueKey = tuple[int, str]  # names a queue: a priority, and a tenant


class TextSink(Protocol):
    """Turns a sequence's tokens into text, and says when a stop string has ended it."""

    stopped: bool

    @property
    def held(self) -> str:
        """Text that is known but not certain."""

    @property
    def unfinished(self) -> bool: ...

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Outbox(Protocol):
    """Where a sequence's deltas go; `index` distinguishes the sequences that share one."""

    def put(self, index: int, delta: Delta) -> None: ...


class Stage(Enum):
    """Where a sequence is on its way through the scheduler."""

    NEW = "new"  # the scheduler does not know it yet
    QUEUED = "queued"
    AWAITING_PREFIX = "awaiting_prefix"  # waits for a prefix that a running sequence computes
    RUNNING = "running"
    SWAPPED = "swapped"  # preempted by swap: holds a state, and waits for its next time slice
    ENDED = "ended"


WAITING = (Stage.QUEUED, Stage.AWAITING_PREFIX)
HOLDING = (Stage.RUNNING, Stage.SWAPPED)  # a state


@dataclass(slots=True)
class Standing:
    """What decides when a sequence is scheduled, and what its tenant was charged for it. The scheduler's alone."""

    effective_priority: int = 0  # the one at which it competes
    account: Tenant = field(default_factory=Tenant)
    due: float = 0.0  # when its prompt should be computed, or when it had its last token, or was preempted
    since: int = 0  # the step from which on it has run, or has not
    arrival: int = 0  # its number in the order of arrival
    served_at: float = 0.0  # when a step last computed something of it; before, when it arrived
    state_began: int = 0  # tokens generated before it was given its present state
    charged: int = 0  # tokens of the prompt that its tenant was charged for, or that were cached


@dataclass(slots=True)
class Prefix:
    """What a sequence shares with others: where its state is wanted, and what it began with."""

    packed: bytes = b""  # the prompt, where it may be shared
    namespace: str = ""  # inside which it may be
    cuts: list[int] = field(default_factory=list)  # ascending positions at which its state is wanted
    expects: Entry | None = None  # the state that it waited for
    cached: int = 0  # tokens that another sequence had computed


@dataclass(slots=True)
class Times:
    """When something of a sequence happened for the first or last time, in seconds; None before."""

    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    gap: float = 0.0  # before the last token, since the one before it or since arrival


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation. Times are seconds on the clock that the worker passes in.

    It waits until `queue_deadline` at most, and ends by `deadline`; a lower `priority` goes first. It runs in the share
    of `tenant`, which weighs `weight` if that is said, and may begin with the cached prefixes of `key` and `salt`.
    """

    id: str
    prompt: Tokens[int]
    max_tokens: int
    sampling: SamplingParams | None  # None where nothing is generated
    text: TextSink
    outbox: Outbox
    index: int = 0
    arrived: float = 0.0
    n: int = 1  # completions of its prompt, of which this is one
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    show_stop_token: bool = False
    score_prompt: int | None = None  # likeliest tokens with each score of its prompt's; None scores none
    pool: bool = False  # whether the hidden vectors of its prompt are summed, and that is all
    breaks: Tokens[int] = ()  # positions, ascending, at which prefixes end that others are likely to have
    constraint: Constraint | None = None  # what its completion may become; it knows the tokens generated so far
    adjustment: Adjustment | None = None  # of its scores; it counts the tokens generated so far

    key: str = ""
    salt: str = ""
    tenant: str = ""
    weight: float | None = None
    priority: int = 0
    queue_deadline: float | None = None
    deadline: float | None = None
    span: object | None = None  # of the client's request, for those who watch

    stage: Stage = Stage.NEW
    standing: Standing = field(default_factory=Standing)
    prefix: Prefix = field(default_factory=Prefix)
    times: Times = field(default_factory=Times)
    slot: int | None = None
    computed: int = 0  # tokens that have entered the state
    generated: list[int] = field(default_factory=list)
    pooled: list[float] | None = None  # the sum [D] over what is computed
    finish_reason: FinishReason | None = None
    error: BDHError | None = None  # why, where that is ERROR
    _prompt_scores: list[TokenScore] = field(default_factory=list)  # of its tokens but the first, as they come
    _alignment: Alignment | None = None
    _decode_segment: Segment | None = None  # a decode step's, used again and again

    def __post_init__(self) -> None:
        if self.sampling is not None and self.sampling.logprobs is not None:
            self._alignment = Alignment()

    @property
    def queue_key(self) -> QueueKey:
        """The queue that it waits in."""
        return self.priority, self.tenant

    @property
    def pending(self) -> int:
        """Tokens that are known but have not entered the state yet."""
        return len(self.prompt) + len(self.generated) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether the last token that was drawn for it is all that is pending."""
        return bool(self.generated) and self.pending == 1

    @property
    def until_cut(self) -> int:
        """Tokens that are pending up to where its state is wanted next."""
        return next((at - self.computed for at in self.prefix.cuts if at > self.computed), self.pending)

    @property
    def time_in_queue(self) -> float | None:
        """Seconds until it was first given a slot; None where it has not been."""
        return None if self.times.scheduled is None else self.times.scheduled - self.arrived

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.times.first_token is None else self.times.first_token - self.arrived

    def decode_segment(self) -> Segment:
        """The one token that was drawn last as a share of a step."""
        assert self.slot is not None
        segment = self._decode_segment
        if segment is None:
            segment = Segment(self.slot, 0, (), self.sampling, self.adjustment, self.constraint)
            self._decode_segment = segment
        segment.slot, segment.start = self.slot, self.computed
        segment.tokens = self.generated[-1:]
        return segment

    def leave_slot(self) -> int:
        """Its slot, which is another's from now on."""
        slot, self.slot = self.slot, None
        assert slot is not None
        return slot

    def segment(self, tokens: int) -> Segment:
        """The next `tokens` of the pending ones as a share of a step; all of them lead to a new token."""
        assert self.slot is not None
        end = self.computed + tokens
        return Segment(
            slot=self.slot,
            start=self.computed,
            tokens=self.known(self.computed, end),
            sampling=self.sampling if tokens == self.pending else None,
            adjustment=self.adjustment,
            constraint=self.constraint,
            targets=self._targets(end),
            top=self.score_prompt or 0,
            pool=self.pool,
        )

    def _targets(self, end: int) -> Tokens[int]:
        """The tokens of the prompt that tokens up to `end` lead to, where they are to be scored."""
        if self.score_prompt is None or self._prompt_is_scored:
            return ()
        return self.prompt[self.computed + 1 : end + 1]

    @property
    def _prompt_is_scored(self) -> bool:
        return len(self._prompt_scores) == len(self.prompt) - 1

    @property
    def needs_all(self) -> bool:
        """Whether all of its prompt has to be computed for it, whoever else has computed some of it."""
        return self.pool or self.score_prompt is not None

    def take_prompt_scores(self, scores: Tokens[TokenScore]) -> None:
        self._prompt_scores += scores

    def known(self, start: int, end: int) -> Tokens[int]:
        """Its tokens from `start` to `end`, of the prompt and of the completion."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        return [*self.prompt[start:], *self.generated[max(0, start - split) : end - split]]

    def charge(self) -> None:
        """Charges its tenant for what is computed of its prompt, once."""
        computed, standing = min(self.computed, len(self.prompt)), self.standing
        if computed > standing.charged:
            standing.account.charge(computed - standing.charged, 0)
            standing.charged = computed

    def restart(self) -> None:
        """Its state is lost: all that is known is computed again, and leads to the same token."""
        self.computed, self.prefix.cuts, self.pooled = 0, [], None
        if not self._prompt_is_scored:
            self._prompt_scores.clear()

    def add(self, vector: Tokens[float]) -> Delta | None:
        """Takes the sum [D] of the hidden vectors that a step computed; gives the whole sum once all are in it."""
        self.pooled = list(map(operator.add, self.pooled, vector)) if self.pooled else list(vector)
        if self.pending:
            return None
        if not all(map(isfinite, self.pooled)):
            return self.fail(NotFinite())
        self.finish_reason = FinishReason.STOP
        return Delta(finish_reason=FinishReason.STOP, pooled=self.pooled)

    def accept(self, token: int | None, now: float, score: TokenScore | None = None) -> Delta:
        """Takes the token that a step drew, and its score; None says that its logits were not finite."""
        first = not self.generated
        if token is None or (first and not all(isfinite(each.logprob) for each in self._prompt_scores)):
            return self.fail(NotFinite())
        delta = self._grow(token, now, score) if self.max_tokens else self._end_unsaid()
        if first and self.score_prompt is not None:
            delta.prompt_scores = self._prompt_scores
        return delta

    def _end_unsaid(self) -> Delta:
        """Only the prompt was of interest: what was drawn after it is not returned."""
        self.finish_reason = FinishReason.LENGTH
        return Delta(finish_reason=FinishReason.LENGTH)

    def _grow(self, token: int, now: float, score: TokenScore | None) -> Delta:
        if self.constraint is not None and (end := self._constrain(self.constraint, token, score)) is not None:
            return end
        self.generated.append(token)
        if self.adjustment is not None:
            self.adjustment.count(token)
        times = self.times
        times.gap = now - (self.arrived if times.last_token is None else times.last_token)
        times.first_token = now if times.first_token is None else times.first_token
        times.last_token = now
        try:
            text = self._say(token)
        except Exception:  # one request's text must not end the worker, and with it all others
            log.exception("decoding failed in request %s", self.id)
            return self.fail(GenerationFailed("The completion could not be turned into text."))
        delta = Delta(text, [token], self.finish_reason)
        if score is not None:
            delta.logprob = score.logprob
            delta.scores = self._shown(score, text, hidden=self._at_stop and not self.show_stop_token)
        return delta

    def _constrain(self, constraint: Constraint, token: int, score: TokenScore | None) -> Delta | None:
        """The end of the completion, if it does not go on with `token`."""
        try:
            if constraint.accept(token):
                return None
            self.finish_reason = FinishReason.STOP
            text = self.text.flush()
        except InvalidRequest as error:
            return self.fail(error)
        except Exception:  # as with its text: no other request's concern
            log.exception("the constraint failed in request %s", self.id)
            return self.fail(GenerationFailed("The completion could not be held to its grammar."))
        scores = None if score is None else self._shown(score, text, hidden=True)
        return Delta(text, finish_reason=FinishReason.STOP, scores=scores)

    def _shown(self, score: TokenScore, text: str, hidden: bool) -> list[tuple[int, TokenScore]]:
        """The logprobs that are returned with `text`; that of the last token is not if it is `hidden`."""
        assert self._alignment is not None
        if self.finish_reason is None:
            return self._alignment.push(score, text, self.text.held, self.text.unfinished)
        return self._alignment.end(score, text, cut=self.text.stopped, hidden=hidden)

    @property
    def _at_stop(self) -> bool:
        """Whether the last token ends the completion. Structured output may leave no other before `min_tokens`."""
        return len(self.generated) > self.min_tokens and self.generated[-1] in self.stop_token_ids

    def _say(self, token: int) -> str:
        """The text that `token` makes certain; says in `finish_reason` whether it is the last."""
        at_stop = self._at_stop
        complete = at_stop or (self.constraint is not None and self.constraint.complete)
        text = "" if at_stop and not self.show_stop_token else self.text.push(token)
        if complete or len(self.generated) >= self.max_tokens:
            self.finish_reason = FinishReason.STOP if complete else FinishReason.LENGTH
            text += self.text.flush()
        if self.text.stopped:
            self.finish_reason = FinishReason.STOP
        return text

    def fail(self, error: BDHError) -> Delta:
        self.finish_reason, self.error = FinishReason.ERROR, error
        return Delta(finish_reason=FinishReason.ERROR, error=error)
