"""The types that packages share: requests, sampling parameters, steps and their outcomes, deltas."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from io import StringIO
from typing import NamedTuple, Protocol, runtime_checkable

from bdh_batch.errors import BDHError


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # only in the chat API: there a response that stopped after a call says so
    ABORT = "abort"
    ERROR = "error"


class LogitBias:
    """What is added to the logits of some tokens, each of which is there once. Made once for a request.

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
    """Sampling parameters: how the next token is chosen.

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
    """Each of `tokens` once, ascending, as int64."""
    return array("q", sorted(set(tokens)))


class Adjustment:
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
    def of(cls, sampling: SamplingParams, prompt: Iterable[int], banned: array[int], early: int) -> Adjustment | None:
        """None where nothing changes."""
        bans = banned if early else NO_TOKENS
        if not (sampling.penalises or sampling.logit_bias or bans):
            return None
        # The other penalties do not look at the prompt.
        return cls(sampling, distinct(prompt) if sampling.repetition_penalty != 1 else NO_TOKENS, bans, early)

    def afresh(self) -> Adjustment:
        """That of another choice for the same prompt."""
        return Adjustment(self.sampling, self.prompt, self._banned, self._early)

    @property
    def bans(self) -> array[int]:
        return self._banned if self._length < self._early else NO_TOKENS

    def count(self, token: int) -> None:
        """The completion has grown by `token`."""
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


class TokenScore(NamedTuple):
    """A token's log-probability, and the likeliest tokens at its position with theirs, likeliest first.

    They are the log-softmax of the model's own logits, before temperature, penalties and all else.
    """

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    rank: int = 0  # how many tokens are at least as likely, itself included; of a prompt's tokens only


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt that has yet to be tokenized.

    `add_special`: whether the tokenizer adds what belongs around a text. `stand_ins`: characters in it, with the
    special tokens that they stand for, beside which nothing is one; None is a text in which what spells one is one.
    `ends`: offsets, ascending, of prefixes that other prompts are likely to have.
    """

    text: str
    add_special: bool = True
    stand_ins: Mapping[str, str] | None = None
    ends: tuple[int, ...] = ()


class Constraint(Protocol):
    """What one completion may still become. `mask` comes before each `accept`, and may be asked for again."""

    @property
    def complete(self) -> bool:
        """Whether nothing can follow the tokens that it has accepted."""

    def mask(self) -> bytes | None:
        """A bit per token, the lowest first: whether it may come next. None is any token. Never raises."""

    def accept(self, token: int) -> bool:
        """Takes the token that was drawn; False where the completion has ended before it.

        Raises:
            InvalidRequest: the completion can neither go on nor end.
        """


@runtime_checkable
class Grammar(Protocol):
    """A compiled grammar for the structured output of a request."""

    warnings: Sequence[Mapping[str, str]]  # what was left out of it, which completions may not keep to

    def constraint(self, early: float) -> Constraint:
        """For one completion, which is still empty, and before `early` tokens ends only where nothing can follow."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as tokens that are known to be the model's."""

    tokens: Sequence[int]
    param: str = "prompt"  # the field of the client's request that an error about it names
    breaks: tuple[int, ...] = ()  # positions, ascending, of prefixes that other prompts are likely to have


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from: its id, whose it is, and what its HTTP head says of it."""

    id: str
    tenant: str = ""  # whose share of the machine it uses; without API keys, one for each address
    weight: float | None = None  # of that share; None leaves it to the settings
    cache_namespace: str = ""  # an opaque label; only requests with the same one share cached prefixes
    timeout: float | None = None  # seconds from its arrival to its end; None leaves it to the settings
    span: object | None = None  # of the client's request, where spans are made; only they look into it


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A client's request, complete: `n` sequences for each of its prompts, one after the other, and when they stop.

    Without `sampling` nothing is generated: the response is the sum of the final hidden vectors of a prompt's tokens.
    """

    origin: Origin
    prompts: Sequence[Prompt]
    max_tokens: int
    max_tokens_param: str | None = "max_tokens"  # the field that said so; None where it is a default, which gives way
    sampling: SamplingParams | None = None  # but for the seeds
    seeds: Sequence[int] = (0,)  # one for each sequence
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_before: str = ""  # a text from which on nothing is a stop string
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # whether the text shows what ended it
    ignore_eos: bool = False  # whether the model's own end of text does not end it
    min_tokens: int = 0  # before which nothing that stops it does
    bad_words: tuple[str, ...] = ()  # texts whose token sequences are never generated
    allowed_token_ids: tuple[int, ...] | None = None  # the only tokens that may be generated; None is any
    show_special: bool = False  # whether the text shows special tokens
    score_prompt: int | None = None  # likeliest tokens with each score of the prompt's tokens; None scores none
    grammar: Grammar | None = None  # of its structured output
    salt: str = ""  # requests of different salts share no prefixes
    priority: int = 0  # lower goes first

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts. One counts once, however many sequences it has, as in `usage`."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        """Those of its prompts, and all that could be generated."""
        return self.prompt_tokens + len(self.prompts) * self.n * self.max_tokens


@dataclass(slots=True)
class Delta:
    """What a sequence gained: text that is safe to show, and the tokens behind it.

    The last one of a sequence has `finish_reason`; when that is ERROR, `error` is why. `scores` are of tokens whose
    text is shown by now, each with where its text begins in the completion; `logprob` is the sum of all tokens'. Where
    the request asked to `pool`, the last one has the sum [D] of the hidden vectors.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: BDHError | None = None
    scores: list[tuple[int, TokenScore]] | None = None
    logprob: float = 0.0
    prompt_scores: Sequence[TokenScore] | None = None  # of all its tokens but the first; they come at once
    pooled: Sequence[float] | None = None


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
        of.finish_reason = later.finish_reason
        of.error = later.error
        of.logprob += later.logprob
        if later.scores is not None:
            of.scores = of.scores or []
            of.scores += later.scores
        if later.prompt_scores is not None:
            of.prompt_scores = later.prompt_scores
        of.pooled = later.pooled

    @property
    def tokens(self) -> int:
        """How many have come."""
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

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Segment:
    """A sequence's share of a step: `tokens` enter its state, in `slot`, at positions `start`, `start` + 1, …

    A segment that starts at 0 begins with an empty state. With `sampling`, the token after its last one is drawn, among
    those that `constraint` allows; with `pool`, its tokens' final hidden vectors are summed.
    The scheduler may use it again for a later step; it does not change while its step is computed.
    `targets` are to be scored: token i of them as what follows token i of `tokens`.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    sampling: SamplingParams | None
    adjustment: Adjustment | None = None
    constraint: Constraint | None = None
    targets: Sequence[int] = ()
    top: int = 0  # likeliest tokens that come with each target's score
    pool: bool = False


class Copy(NamedTuple):
    """The state in slot `source` is copied over that in slot `target`; either may lie on the device or on the host."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A step: copies, in their order, then one ragged batch of segments, each of a different slot on the device.

    Slots are numbered through: those on the device first, then those in the host's memory. The memory of the slots in
    `releases` goes back to the system; they hold no state that anyone needs.
    """

    segments: Sequence[Segment]
    copies: Sequence[Copy] = ()
    releases: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step drew: per segment the next token, None where none was asked for or none could be drawn.

    By the index of their segment, `scores` has those of the drawn tokens, `target_scores` those of targets, and
    `pooled` the sum [D] of the hidden vectors where that was asked for. `active` is, by layer, the share of neurons
    that fired for its tokens; empty where that was not measured.
    """

    drawn: Sequence[int | None]
    scores: Mapping[int, TokenScore] = field(default_factory=dict)
    target_scores: Mapping[int, Sequence[TokenScore]] = field(default_factory=dict)
    pooled: Mapping[int, Sequence[float]] = field(default_factory=dict)
    active: Sequence[float] = ()
