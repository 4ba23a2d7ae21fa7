"""A request on its way: what is known of its tokens, how far they have entered its state, when what happened."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Protocol

from bdh_batch.errors import BDHError, GenerationFailed, NotFinite
from bdh_batch.messages import Delta, FinishReason, SamplingParams, Segment

log = logging.getLogger(__name__)


class TextSink(Protocol):
    """Turns a sequence's tokens into text, and says when a stop string has ended it."""

    stopped: bool

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Outbox(Protocol):
    """Where a sequence's deltas go; `index` tells apart the sequences that share one."""

    def put(self, index: int, delta: Delta) -> None: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation. Times are seconds on the clock that the worker passes in."""

    id: str
    prompt: Tokens[int]
    max_tokens: int
    sampling: SamplingParams
    text: TextSink
    outbox: Outbox
    index: int = 0
    arrived: float = 0.0

    slot: int | None = None
    computed: int = 0  # tokens that have entered the state
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: BDHError | None = None  # why, where that is ERROR
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    gap: float = 0.0  # before the last token, since the one before it or since arrival

    @property
    def pending(self) -> int:
        """Tokens that are known but have not entered the state yet."""
        return len(self.prompt) + len(self.generated) - self.computed

    def segment(self, tokens: int) -> Segment:
        """The next `tokens` of the pending ones as a share of a step; all of them lead to a new token."""
        assert self.slot is not None
        if self.generated and self.computed >= len(self.prompt):
            known: Tokens[int] = self.generated[self.computed - len(self.prompt) :]
        else:
            known = self.prompt[self.computed : self.computed + tokens]
        sampling = self.sampling if tokens == self.pending else None
        return Segment(slot=self.slot, start=self.computed, tokens=known, sampling=sampling)

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
