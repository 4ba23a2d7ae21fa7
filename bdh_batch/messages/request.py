"""A client's request, complete, and the progress of its sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from bdh_batch.messages.latent import LatentSteps
from bdh_batch.messages.neurons import NeuronsAsked
from bdh_batch.messages.sampling import SamplingParams
from bdh_batch.messages.state import SavedState


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

    @property
    def warnings(self) -> Sequence[Mapping[str, str]]:
        """What was left out of it, which completions may not keep to."""

    def constraint(self, early: float = 0) -> Constraint:
        """For one completion, which is still empty, and before `early` tokens ends only where nothing can follow."""


@dataclass(frozen=True, slots=True)
class GrammarText:
    """A grammar that has been tried out, and is compiled where its constraints are needed: in another process.

    Args:
        text: in llguidance's language.
        size: bytes that it takes once it is compiled.
        tenant: with whom alone it may share what it learns.
    """

    text: str
    size: int
    param: str
    trigger: str = ""
    warnings: Sequence[Mapping[str, str]] = ()
    tenant: str = ""

    def constraint(self, early: float = 0) -> Constraint:
        raise NotImplementedError("a text that is not compiled")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as tokens that are known to be the model's, with the latent steps of earlier turns."""

    tokens: Sequence[int]
    param: str = "prompt"  # the field of the client's request that an error about it names
    breaks: tuple[int, ...] = ()  # positions, ascending, of prefixes that other prompts are likely to have
    latents: tuple[int, ...] = ()  # positions, ascending, of latent steps


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from: its id, whose it is, and what its HTTP head says of it."""

    id: str
    tenant: str = ""  # whose share of the machine it uses; without API keys, one for each address
    weight: float | None = None  # of that share; None leaves it to the settings
    cache_namespace: str = ""  # an opaque label; only requests with the same one share cached prefixes
    timeout: float | None = None  # seconds from its arrival to its end; None leaves it to the settings
    span: object | None = None  # of the client's request, where spans are made; only they look into it

    def timeout_within(self, limit: float | None) -> float | None:
        """Returns the shorter of its timeout and the `limit` of the settings, in seconds; None where neither is set."""
        return min((each for each in (self.timeout, limit) if each is not None), default=None)


@dataclass(frozen=True, slots=True)
class Written:
    """A request as its client wrote it, for a backend that takes text: an upstream.

    Args:
        prompts: a text or token ids for each; with `messages`, one that a template made of them, or none.
        messages: a conversation, as it came.
        fields: the other fields of the body, by their names in the API, but those that ask for nothing.
        headers: those of the client's that the backend is configured to pass on.
    """

    prompts: Sequence[str | Sequence[int]]
    messages: Sequence[Mapping[str, Any]] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


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
    latent: LatentSteps | None = None  # between each prompt and its completions; None: the model has none
    prompt_logprobs: int | None = None  # likeliest tokens that logprobs of prompt tokens contain; None is no logprobs
    neurons: NeuronsAsked | None = None  # of its tokens, that the response contains
    grammar: Grammar | None = None  # of its structured output
    salt: str = ""  # requests of different salts share no prefixes
    priority: int = 0  # lower goes first
    state: SavedState | None = None  # in which all sequences begin: it has read the first tokens of each prompt
    state_optional: bool = (
        False  # whether the tokens are computed where the state cannot be read; else that is an error
    )
    save_to: str | None = None  # a path, to which the state of the first sequence is written once it is complete
    written: Written | None = None  # where the backend takes text; `prompts` then are as many tokens as it may have

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts. One counts once, however many sequences it has, as in `usage`."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        """Those of its prompts, its latent steps, and all that could be generated."""
        return self.prompt_tokens + (self.reasoning_tokens or 0) + len(self.prompts) * self.n * self.max_tokens

    @property
    def reasoning_tokens(self) -> int | None:
        """The latent steps of all sequences; None: the model has none."""
        return None if self.latent is None else len(self.prompts) * self.n * self.latent.count

    @property
    def watched_tokens(self) -> int:
        """All whose neurons the response could show."""
        if self.neurons is None:
            return 0
        prompts = self.prompt_tokens if self.neurons.prompt else 0
        return self.n * (prompts + len(self.prompts) * self.max_tokens)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far another engine has computed a sequence.

    It has generated `tokens`. Its client has received `ahead` more, and `characters` and `logprobs` beyond those of
    `tokens`. These are generated again, the same, and are not returned a second time.
    """

    tokens: Sequence[int] = ()
    ended: bool = False
    ahead: int = 0
    characters: int = 0
    logprobs: int = 0
