"""Sampling parameters, and the logits processors that change logits before a token is drawn."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


class LogitBias:
    """The amounts that a request adds to the logits of some tokens, each of them once.

    Args:
        tokens: int64.
        amounts: float32.
    """

    __slots__ = ("amounts", "tokens")

    def __init__(self, tokens: array[int], amounts: array[float]) -> None:
        self.tokens = tokens
        self.amounts = amounts

    @classmethod
    def of(cls, amounts: Mapping[int, float]) -> LogitBias | None:
        """None where nothing is added."""
        return cls(array("q", amounts), array("f", amounts.values())) if amounts else None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling parameters of a sequence: how the next token is chosen.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and a `repetition_penalty` of 1 are off. The random
    number for the token at a position follows from `seed` (64 bits) and that position alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias | None = None
    logprobs: int | None = None  # a drawn token comes with its log-probability and this many likeliest

    @property
    def penalises(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


NO_TOKENS = array("q")


def distinct(tokens: Iterable[int]) -> array[int]:
    """Returns each of `tokens` once, ascending, as int64."""
    return array("q", sorted(set(tokens)))


class LogitsProcessors:
    """The logits processors of one sequence: bias, penalties, and tokens that are banned for now.

    The choices for one prompt share whatever is as large as the request makes it; each has only what it counts. The
    scheduler counts; the sampler only reads.

    Args:
        prompt: the distinct tokens of the prompt, ascending; empty where nothing penalises them.
        banned: tokens that cannot be drawn while the completion has fewer than `early` tokens.
    """

    __slots__ = ("_banned", "_early", "_index", "_length", "generated", "prompt", "repeated", "sampling", "times")

    def __init__(self, sampling: SamplingParams, prompt: array[int], banned: array[int], early: int) -> None:
        self.sampling = sampling
        self.prompt = prompt
        self.generated = array("q")  # the distinct tokens of the completion, as far as they are penalised
        self.times = array("q")  # how often each came
        self.repeated = array("q")  # 1 for each that is in `prompt`, too; else 0
        self._index: dict[int, int] = {}  # of each in `generated`
        self._length = 0  # of the completion
        self._banned = banned
        self._early = early

    @classmethod
    def of(
        cls, sampling: SamplingParams, prompt: Iterable[int], banned: array[int], early: int
    ) -> LogitsProcessors | None:
        """Makes those of a sequence; None where no logit would change."""
        bans = banned if early else NO_TOKENS
        if not (sampling.penalises or sampling.logit_bias or bans):
            return None
        # The other penalties do not look at the prompt.
        known = distinct(prompt) if sampling.repetition_penalty != 1 else NO_TOKENS
        return cls(sampling, known[bisect_left(known, 0) :], bans, early)  # latent steps are no tokens

    def afresh(self) -> LogitsProcessors:
        """Makes those of another choice for the same prompt."""
        return LogitsProcessors(self.sampling, self.prompt, self._banned, self._early)

    @property
    def is_fixed(self) -> bool:
        """Whether they change the logits of every token to come alike."""
        return not self.sampling.penalises and not self.bans

    @property
    def bans(self) -> array[int]:
        return self._banned if self._length < self._early else NO_TOKENS

    def count(self, token: int) -> None:
        """Counts a token that was added to the completion."""
        self._length += 1
        if not self.sampling.penalises:
            return
        at = self._index.setdefault(token, len(self.generated))
        if at == len(self.generated):
            found = bisect_left(self.prompt, token)
            self.generated.append(token)
            self.times.append(0)
            self.repeated.append(found < len(self.prompt) and self.prompt[found] == token)
        self.times[at] += 1
