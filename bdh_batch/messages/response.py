"""The parts of a response: deltas, logprobs, usage, and why a sequence ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import StringIO
from typing import Any, NamedTuple

import msgspec

from bdh_batch.errors import BDHError
from bdh_batch.messages.neurons import Neurons
from bdh_batch.messages.state import SavedState

UNKNOWN_TOKEN = -1  # stands for a token whose id an upstream does not say


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # only in the chat API: there a response that stopped after a call says so
    CONTENT_FILTER = "content_filter"  # only of an upstream that left something out
    ABORT = "abort"
    ERROR = "error"


class TokenLogprob(NamedTuple):
    """A token's log-probability, and the likeliest tokens at its position with theirs, likeliest first.

    They are the log-softmax of the model's own logits, before temperature, penalties and all else.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    rank: int = 0  # how many tokens are at least as likely, itself included; of a prompt's tokens only


class Delta(msgspec.Struct, array_like=True):
    """What a step adds to a sequence's completion: text that is safe to show, and the tokens behind it.

    The last one of a sequence has `finish_reason`; when that is ERROR, `error` is why. `logprobs` are of tokens whose
    text is shown by now, each with where its text begins in the completion; `logprob` is the sum of all tokens'. Where
    the request asked to `pool`, the last one has the sum [D] of the hidden vectors; where it asked for `neurons`, each
    has those of its tokens, after those of the prompt's if it comes first. `extras` are members that an
    upstream sent beside the text, as `tool_calls`; the client gets them as they are. `stop` is the stop string that
    ended it, if one did, and it is known which.

    Where the request has `save_to`, its first sequence has one delta with `saved` or, where there is no such file,
    with `save_error`. That is its last one, or one more after it.

    One is made for each token, and crosses between processes as it is: as a dataclass, making it would take longer than
    anything else that is done for a token outside the step.
    """

    text: str = ""
    tokens: list[int] = []
    finish_reason: FinishReason | None = None
    error: BDHError | None = None
    logprobs: list[tuple[int, TokenLogprob]] | None = None
    logprob: float = 0.0
    prompt_logprobs: Sequence[TokenLogprob] | None = None  # of all its tokens but the first; they come at once
    pooled: Sequence[float] | None = None
    neurons: list[Neurons] | None = None
    extras: list[Mapping[str, Any]] | None = None
    stop: str | None = None
    saved: SavedState | None = None
    save_error: str | None = None

    @property
    def ends(self) -> int:
        """How many things have come to their end with it: a sequence, and the writing of its state."""
        return (self.finish_reason is not None) + (self.saved is not None or self.save_error is not None)

    def replaced(self, **fields: Any) -> Delta:
        """Returns a copy with other `fields`."""
        return msgspec.structs.replace(self, **fields)


# Is called on the event loop with new deltas, oldest first. Returns whether it took them: all, or none.
Taker = Callable[[Sequence[tuple[int, Delta]]], bool]


class Gathering:
    """Merges several deltas of a sequence into one, in time that depends on what they bring and not on how many came
    before: a text that grows by `+=` would be copied for every token."""

    __slots__ = ("_delta", "_text")

    def __init__(self) -> None:
        self._delta = Delta()
        self._text = StringIO(newline="")

    def add(self, later: Delta) -> None:
        of = self._delta
        self._text.write(later.text)
        of.tokens += later.tokens
        if later.finish_reason is not None:  # nothing but what became of its state comes behind the last delta
            of.finish_reason, of.error, of.stop = later.finish_reason, later.error, later.stop
        of.logprob += later.logprob
        if later.logprobs is not None:
            of.logprobs = of.logprobs or []
            of.logprobs += later.logprobs
        if later.prompt_logprobs is not None:
            of.prompt_logprobs = later.prompt_logprobs
        if later.pooled is not None:
            of.pooled = later.pooled
        if later.neurons is not None:
            of.neurons = of.neurons or []
            of.neurons += later.neurons
        of.saved, of.save_error = later.saved or of.saved, later.save_error or of.save_error
        if later.extras:
            of.extras = [*(of.extras or ()), *later.extras]

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return len(self._delta.tokens)

    def whole(self) -> Delta:
        self._delta.text = self._text.getvalue()
        return self._delta


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's, those that did not have to be computed
    estimated: bool = False  # whether an upstream did not say, and no tokenizer of its model is at hand
    reasoning_tokens: int | None = None  # of the completions', those that were latent steps; None: the model has none

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens
