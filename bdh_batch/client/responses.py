"""Responses that the official client has no types for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from openai import BaseModel
from openai.types import CompletionChoice
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


class Tokens(BaseModel):
    """The tokens of a text or a conversation.

    `max_model_len` is None where the model has no bound; `token_strs` is there where it was asked for.
    """

    tokens: list[int]
    count: int
    max_model_len: int | None = None
    token_strs: list[str] | None = None


class Text(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The model's tokenizer.

    `eos_token_ids` are those that end a completion, also where the tokenizer has no name for them. The prefix token is
    what a text can be scored after, from its first token on; a server may not report it."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: list[int]
    prefix_token: str | None = None
    prefix_token_id: int | None = None
    vocab_size: int


class ServerInfo(BaseModel):
    """The server, its model and its settings.

    `config` is the settings that any client may know, by section.
    """

    version: str
    model: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """What the model says of a text, token by token; natural logarithms.

    Attributes:
        tokens: the text of each token.
        logprobs: of each token after those before it; None of a text's first.
        likeliest: whether each is what the model itself would say; None of a text's first.
        offsets: where in the text each begins, in characters.
    """

    tokens: Sequence[str]
    logprobs: Sequence[float | None]
    likeliest: Sequence[bool | None]
    offsets: Sequence[int]

    @property
    def total(self) -> float:
        """The log-likelihood of all tokens but a text's first, which nothing comes before."""
        return sum(each for each in self.logprobs if each is not None)

    @property
    def greedy(self) -> bool:
        """Whether all of it, but a text's first token, is what the model itself would say."""
        return False not in self.likeliest

    def after(self, characters: int) -> Score:
        """The part of the tokens that begin after so many characters: of a completion, after its prompt."""
        first = sum(offset < characters for offset in self.offsets)
        columns = (self.tokens, self.logprobs, self.likeliest, self.offsets)
        return Score(*(column[first:] for column in columns))  # type: ignore[arg-type]

    @staticmethod
    def read(choice: CompletionChoice) -> Score:
        """Reads a completion with `echo`, `logprobs: 1` and `max_tokens: 0`."""
        given = choice.logprobs
        assert given is not None
        tokens, logprobs, offsets = given.tokens or [], given.token_logprobs or [], given.text_offset or []
        tops: list[dict[str, float] | None] = list(given.top_logprobs or [])
        likeliest = [None if top is None else max(top.values()) == own for top, own in zip(tops, logprobs)]
        return Score(tokens, logprobs, likeliest, offsets)


class Metrics:
    """The samples of one scrape."""

    def __init__(self, exposition: str) -> None:
        self._samples = [each for family in text_string_to_metric_families(exposition) for each in family.samples]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that have these labels, among others.

        Raises:
            KeyError: there is none.
        """
        found = [each.value for each in self if each.name == name and labels.items() <= each.labels.items()]
        if not found:
            raise KeyError(f"{name}{labels or ''}")
        return sum(found)
