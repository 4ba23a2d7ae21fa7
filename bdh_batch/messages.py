"""The nouns that the rooms share: what a request asks, what a step does, what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

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

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Segment:
    """A sequence's share of a step: `tokens` enter its state, in `slot`, at positions `start`, `start` + 1, …

    A segment that starts at 0 begins with an empty state. With `sampling`, the token after its last one is drawn.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sampling: SamplingParams | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: one ragged batch of segments, each of a different slot."""

    segments: Sequence[Segment]

    @property
    def tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step drew: per segment the next token, None where none was asked for or its logits were not finite."""

    drawn: Sequence[int | None]
