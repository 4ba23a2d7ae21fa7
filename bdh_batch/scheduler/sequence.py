"""A request on its way: what is known of its tokens, how far they have entered its state, when what happened."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from bdh_batch.errors import BDHError, GenerationFailed, NotFinite
from bdh_batch.messages import Delta, FinishReason, SamplingParams, Segment
from bdh_batch.scheduler.fair_queue import Account
from bdh_batch.scheduler.prefix_cache import Entry

log = logging.getLogger(__name__)


class TextSink(Protocol):
    """Turns a sequence's tokens into text, and says when a stop string has ended it."""

    stopped: bool

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Outbox(Protocol):
    """Where a sequence's deltas go; `index` tells apart the sequences that share one."""

    def put(self, index: int, delta: Delta) -> None: ...


class Stage(Enum):
    QUEUED = "queued"
    FOLLOWING = "following"  # waits for a beginning that another one computes
    RUNNING = "running"
    SUSPENDED = "suspended"  # holds a state, and waits for its next turn
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation. Times are seconds on the clock that the worker passes in.

    It waits until `queue_deadline` at most, and ends by `deadline`; `key` is whose it is, and a lower `priority` goes
    first. It runs in the share of `tenant`, which is `key`'s unless said otherwise, and has `weight` if that is said.
    """

    id: str
    prompt: Tokens[int]
    max_tokens: int
    sampling: SamplingParams
    text: TextSink
    outbox: Outbox
    index: int = 0
    arrived: float = 0.0
    n: int = 1  # answers to its prompt, of which this is one

    key: str = ""
    tenant: str = ""
    weight: float | None = None
    priority: int = 0
    queue_deadline: float | None = None
    deadline: float | None = None

    stage: Stage = Stage.QUEUED
    place: int = 0  # in the order of arrival
    since: int = 0  # the step from which on it has been in its stage
    account: Account = field(default_factory=Account)
    packed: bytes = b""  # the prompt, where it may be shared
    cuts: list[int] = field(default_factory=list)  # ascending positions at which its state is wanted
    expects: Entry | None = None  # the state that it waited for
    slot: int | None = None
    computed: int = 0  # tokens that have entered the state
    cached: int = 0  # of them, those that another sequence had computed
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: BDHError | None = None  # why, where that is ERROR
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    gap: float = 0.0  # before the last token, since the one before it or since arrival
    _turn: Segment | None = None  # a decode step's, used again and again

    @property
    def pending(self) -> int:
        """Tokens that are known but have not entered the state yet."""
        return len(self.prompt) + len(self.generated) - self.computed

    def turn(self) -> Segment:
        """The one pending token as a share of a step."""
        assert self.slot is not None
        token = self.generated[-1] if self.generated else self.prompt[-1]
        turn = self._turn
        if turn is None:
            self._turn = turn = Segment(self.slot, self.computed, [token], self.sampling)
            return turn
        turn.slot, turn.start, turn.tokens = self.slot, self.computed, [token]
        return turn

    def segment(self, tokens: int) -> Segment:
        """The next `tokens` of the pending ones as a share of a step; all of them lead to a new token."""
        assert self.slot is not None
        end = self.computed + tokens
        sampling = self.sampling if tokens == self.pending else None
        return Segment(slot=self.slot, start=self.computed, tokens=self.known(self.computed, end), sampling=sampling)

    def known(self, start: int, end: int) -> Tokens[int]:
        """Its tokens from `start` to `end`, of the prompt and of the answer."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        return [*self.prompt[start:], *self.generated[max(0, start - split) : end - split]]

    def restart(self) -> None:
        """Its state is lost: all that is known is computed again, and leads to the same token."""
        self.computed, self.cuts = 0, []

    def accept(self, token: int | None, now: float) -> Delta:
        """Takes the token that a step drew; None says that its logits were not finite."""
        if token is None:
            return self.fail(NotFinite())
        self.generated.append(token)
        self.gap = now - (self.arrived if self.last_token is None else self.last_token)
        self.first_token = now if self.first_token is None else self.first_token
        self.last_token = now
        try:
            text = self.text.push(token)
            if len(self.generated) >= self.max_tokens:
                self.finish_reason = FinishReason.LENGTH
                text += self.text.flush()
            if self.text.stopped:
                self.finish_reason = FinishReason.STOP
        except Exception:  # one request's text must not end the worker, and with it all others
            log.exception("decoding failed in request %s", self.id)
            return self.fail(GenerationFailed("The answer could not be turned into text."))
        return Delta(text, [token], self.finish_reason)

    def fail(self, error: BDHError) -> Delta:
        self.finish_reason, self.error = FinishReason.ERROR, error
        return Delta(finish_reason=FinishReason.ERROR, error=error)
