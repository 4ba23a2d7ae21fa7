"""The nouns that the rooms share: what a request asks, what a step does, what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from bdh_batch.errors import BDHError


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. The random number for the token at a position follows
    from `seed` (64 bits) and that position alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: a prompt as text or token ids, and when to stop."""

    id: str
    prompt: str | Sequence[int]
    max_tokens: int
    max_tokens_asked: bool = True  # False where it is a default, which gives way to the model's longest context
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    prompt_param: str = "prompt"  # the field of the client's request that an error about the prompt names
    n: int = 1  # answers to its prompt, of which this is one
    key: str = ""  # whose request it is: an opaque label, the same for all requests of one API key
    priority: int = 0  # lower goes first
    timeout: float | None = None  # seconds from its arrival to its end; None leaves it to the settings


@dataclass(slots=True)
class Delta:
    """What a sequence gained: text that is safe to show, and the tokens behind it.

    The last one of a sequence bears `finish_reason`; when that is ERROR, `error` is why.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: BDHError | None = None

    def absorb(self, later: Delta) -> None:
        """Appends what `later` brings."""
        self.text += later.text
        self.tokens += later.tokens
        self.finish_reason = later.finish_reason
        self.error = later.error


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's, those that did not have to be computed

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Segment:
    """A sequence's share of a step: `tokens` enter its state, in `slot`, at positions `start`, `start` + 1, …

    A segment that starts at 0 begins with an empty state. With `sampling`, the token after its last one is drawn.
    Whoever planned it may use it again for a later step; it holds still while its step is computed.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sampling: SamplingParams | None


class Copy(NamedTuple):
    """The state in slot `source` is copied over that in slot `target`; either may lie on the device or on the host."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: copies, in their order, then one ragged batch of segments, each of a different slot on the device.

    Slots are numbered through: those on the device first, then those in the host's memory.
    """

    segments: Sequence[Segment]
    copies: Sequence[Copy] = ()

    @property
    def tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step drew: per segment the next token, None where none was asked for or none could be drawn.

    `active` is, by layer, the share of neurons that fired for one of its tokens; mostly nobody has looked.
    """

    drawn: Sequence[int | None]
    active: Sequence[float] = ()
