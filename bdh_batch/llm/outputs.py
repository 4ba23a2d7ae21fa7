"""What the Python API returns. Names are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability.

    Args:
        rank: how many tokens are at least as likely, itself included; None of one that is not among the likeliest that
            were asked for.
        decoded_token: its text; where its bytes are none, as `bytes:\\xf0`.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """A completion, or, of a stream, a piece of one.

    Args:
        index: of the completion among the `n` for its prompt.
        cumulative_logprob: the sum of its tokens' log-probabilities; None where `logprobs` was not asked for.
        logprobs: for each token, by token id, itself and the likeliest.
        finish_reason: "stop" or "length"; None where there is more to come.
        stop_reason: the stop string or the id of `stop_token_ids` that ended it; None where it ended otherwise.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The completions of one prompt.

    Args:
        prompt: as it was given; of a conversation, what the template made of it; None where token ids were given.
        prompt_token_ids: with those that its state has read, if it began in one.
        prompt_logprobs: for each token, by token id, itself and the likeliest; None for the first one.
        num_cached_tokens: those of the prompt that did not have to be computed.
        latent_token_ids: what stands for the latent steps after the prompt: -1 for each, or -2 where the state was only
            read.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    latent_token_ids: list[int] = field(default_factory=list)
    finished: bool = True


@dataclass(slots=True)
class EmbeddingOutput:
    """A vector of length 1: the mean of the final hidden vectors over a text's tokens."""

    embedding: list[float] = field(repr=False)

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class ScoringOutput:
    """How likely a text is.

    Args:
        score: its log-probability, the sum of `logprobs`.
        token_ids: its tokens.
        logprobs: of each, after all before it.
        is_greedy: whether each is the likeliest, so that `temperature=0` would have written the same.
    """

    score: float
    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool


@dataclass(slots=True)
class ScoringRequestOutput:
    """The score of one text after its prompt."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


class Neuron(NamedTuple):
    """A neuron that fired, by its number in its head, and its activation."""

    head: int
    neuron: int
    value: float


class LayerNeurons(NamedTuple):
    """What a token fired in one layer.

    Args:
        active: the share of the layer's neurons that fired.
        strongest: the strongest first.
    """

    active: float
    strongest: list[Neuron]


@dataclass(slots=True)
class TokenNeurons:
    """The neurons that fired when a token was read.

    Args:
        decoded_token: its text; where its bytes are none, as `bytes:\\xf0`.
        layers: the first layer first.
    """

    token_id: int
    decoded_token: str
    layers: list[LayerNeurons] = field(repr=False)


@dataclass(slots=True)
class NeuronsRequestOutput:
    """The neurons of each token of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[TokenNeurons]
    finished: bool = True


@dataclass(frozen=True, slots=True)
class State:
    """A saved state: what the model remembers of the tokens that it has read. Generations begin in it, any number of
    times.

    Args:
        created_at, expires_at: Unix seconds.
        fingerprint: of the model's weights: with others, it cannot be used.
        tokens: how many it has read.
        file_bytes: of its file; 0 where that made room for others: it is computed again when needed.
    """

    id: str
    created_at: int
    expires_at: int
    model: str
    fingerprint: str
    dtype: str
    tokens: int
    file_bytes: int
    metadata: Mapping[str, str]


Prompt = (
    str | Sequence[int] | Mapping[str, object]
)  # as vLLM's: a text, token ids, {"prompt": …}, {"prompt_token_ids": …}
Message = Mapping[str, object]
