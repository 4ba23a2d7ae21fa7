"""Turns the tokens that steps draw for one sequence into deltas: text, logprobs, and an end. Knows nothing of slots."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

from bdh_batch.engine.alignment import Alignment, Shown
from bdh_batch.errors import BDHError, GenerationFailed, InvalidRequest, NotFinite
from bdh_batch.messages import (
    Constraint,
    Delta,
    FinishReason,
    LogitsProcessors,
    Outcome,
    SamplingParams,
    Segment,
    TokenLogprob,
)

log = logging.getLogger(__name__)


class TextSink(Protocol):
    """Turns a sequence's tokens into text, and says when a stop string has ended it."""

    stopped: bool
    found: str | None  # that stop string

    @property
    def held(self) -> str:
        """Text that is known but not certain."""

    @property
    def unfinished(self) -> bool: ...

    def push(self, token: int, /) -> str: ...

    def flush(self) -> str: ...


@dataclass(slots=True, eq=False)
class Completion:
    """Makes the segments of one sequence, and deltas of what steps computed for them.

    Args:
        sampling: None where nothing is generated.
        prompt_logprobs: how many likeliest tokens the logprobs of the prompt's tokens contain; None is no logprobs.
        pool: whether the hidden vectors of the prompt are summed, and that is all.
        constraint: of its structured output; it has accepted the tokens generated so far.
        processors: its logits processors; they count the tokens generated so far.
        watches_prompt: whether the response shows the neurons of the prompt's tokens.
        latent_steps: with which the prompt ends; no token that a logprob could be of.
        id: the request's, for the log.
    """

    prompt: Tokens[int]
    max_tokens: int
    sampling: SamplingParams | None
    text: TextSink
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    show_stop_token: bool = False
    prompt_logprobs: int | None = None
    pool: bool = False
    constraint: Constraint | None = None
    processors: LogitsProcessors | None = None
    watches_prompt: bool = False
    latent_steps: int = 0
    id: str = ""

    _length: int = field(default=0, init=False)  # tokens generated
    _pooled: list[float] | None = field(default=None, init=False)  # the sum [D] over what is computed
    _prompt_logprobs: list[TokenLogprob] = field(default_factory=list, init=False)  # of all but the first, as they come
    _alignment: Alignment | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.sampling is not None and self.sampling.logprobs is not None:
            self._alignment = Alignment()

    @property
    def needs_all(self) -> bool:
        """Whether all of its prompt has to be computed, without a cached prefix."""
        return self.pool or self.watches_prompt or self.prompt_logprobs is not None

    def segment(self, slot: int, start: int, tokens: Tokens[int], draws: bool) -> Segment:
        """Makes the segment that computes `tokens` from position `start` on and, with `draws`, draws the next token."""
        wanted = self.prompt_logprobs is not None and not self._has_prompt_logprobs
        return Segment(
            slot=slot,
            start=start,
            tokens=tokens,
            sampling=self.sampling if draws else None,
            processors=self.processors,
            constraint=self.constraint,
            targets=self.prompt[start + 1 : min(start + len(tokens) + 1, self._scored)] if wanted else (),
            top=self.prompt_logprobs or 0,
            pool=self.pool,
        )

    def take(self, segment: Segment, outcome: Outcome, row: int) -> Delta | None:
        """Takes what a step computed for `segment`, its row of `outcome`; returns a delta if there is one."""
        if segment.targets:
            self._prompt_logprobs += outcome.target_logprobs[row]
        if segment.pool:
            return self.add(outcome.pooled[row], complete=segment.start + len(segment.tokens) == len(self.prompt))
        if segment.sampling is None:
            return None
        return self.accept(outcome.drawn[row], None if self._alignment is None else outcome.logprobs.get(row))

    def restart(self) -> None:
        """Prepares for a lost state: prompt and generated tokens are computed again, with the same results."""
        self._pooled = None
        if not self._has_prompt_logprobs:
            self._prompt_logprobs.clear()

    def resume(self, tokens: Tokens[int]) -> None:
        """Begins after `tokens`, which another engine has generated and returned.

        Raises:
            InvalidRequest: the constraint does not take them.
        """
        shown = 0
        for token in tokens:
            if self.constraint is not None:
                self.constraint.accept(token)
            if self.processors is not None:
                self.processors.count(token)
            shown += len(self.text.push(token))
        self._length = len(tokens)
        self.prompt_logprobs = None  # those came with the first token
        if self._alignment is not None:
            self._alignment = Alignment(shown)

    def add(self, vector: Tokens[float], complete: bool) -> Delta | None:
        """Takes the sum [D] of the hidden vectors that a step computed; gives the whole sum once it is `complete`."""
        self._pooled = list(map(operator.add, self._pooled, vector)) if self._pooled else list(vector)
        if not complete:
            return None
        if not all(map(isfinite, self._pooled)):
            return _failed(NotFinite())
        return Delta(finish_reason=FinishReason.STOP, pooled=self._pooled)

    def accept(self, token: int | None, logprob: TokenLogprob | None = None) -> Delta:
        """Takes the token that a step drew, and its logprobs; None says that its logits were not finite."""
        if token is None:
            return _failed(NotFinite())
        return self._grow(token, logprob) if self._length else self._begin(token, logprob)

    @property
    def _has_prompt_logprobs(self) -> bool:
        return len(self._prompt_logprobs) == self._scored - 1

    @property
    def _scored(self) -> int:
        """Tokens of the prompt, its latent steps left out."""
        return len(self.prompt) - self.latent_steps

    def _begin(self, token: int, logprob: TokenLogprob | None) -> Delta:
        if not all(isfinite(each.logprob) for each in self._prompt_logprobs):
            return _failed(NotFinite())
        # Where only the prompt was of interest, what was drawn after it is not returned.
        delta = self._grow(token, logprob) if self.max_tokens else Delta(finish_reason=FinishReason.LENGTH)
        if self.prompt_logprobs is not None:
            delta.prompt_logprobs = self._prompt_logprobs
        return delta

    def _grow(self, token: int, logprob: TokenLogprob | None) -> Delta:
        if self.constraint is not None and (end := self._constrain(self.constraint, token, logprob)) is not None:
            return end
        self._length += 1
        if self.processors is not None:
            self.processors.count(token)
        # Structured output may leave no other token that ends it before `min_tokens`.
        at_stop = token in self.stop_token_ids and self._length > self.min_tokens
        complete = at_stop or (self.constraint is not None and self.constraint.complete)
        reason, out = None, self.text
        try:
            text = "" if at_stop and not self.show_stop_token else out.push(token)
            if complete or self._length >= self.max_tokens:
                reason = FinishReason.STOP if complete else FinishReason.LENGTH
                text += out.flush()
            if out.stopped:
                reason = FinishReason.STOP
        except Exception:  # one request's text must not end the worker, and with it all others
            log.exception("decoding failed in request %s", self.id, extra={"fields": {"request_id": self.id}})
            return _failed(GenerationFailed("The completion's tokens could not be decoded."))
        delta = Delta(text, [token], reason, stop=out.found)
        if logprob is not None:
            delta.logprob = logprob.logprob
            delta.logprobs = self._shown(logprob, text, reason, hidden=at_stop and not self.show_stop_token)
        return delta

    def _constrain(self, constraint: Constraint, token: int, logprob: TokenLogprob | None) -> Delta | None:
        """The end of the completion, if it does not go on with `token`."""
        try:
            if constraint.accept(token):
                return None
            text = self.text.flush()
        except InvalidRequest as error:
            return _failed(error)
        except Exception:  # as with its text: no other request's concern
            log.exception("the constraint failed in request %s", self.id, extra={"fields": {"request_id": self.id}})
            return _failed(GenerationFailed("The grammar of the structured output failed."))
        logprobs = None if logprob is None else self._shown(logprob, text, FinishReason.STOP, hidden=True)
        return Delta(text, finish_reason=FinishReason.STOP, logprobs=logprobs, stop=self.text.found)

    def _shown(self, logprob: TokenLogprob, text: str, reason: FinishReason | None, hidden: bool) -> Shown:
        """The logprobs that are returned with `text`; that of the last token is not if it is `hidden`."""
        assert self._alignment is not None
        if reason is None:
            return self._alignment.push(logprob, text, self.text.held, self.text.unfinished)
        return self._alignment.end(logprob, text, cut=self.text.stopped, hidden=hidden)


def _failed(error: BDHError) -> Delta:
    return Delta(finish_reason=FinishReason.ERROR, error=error)
