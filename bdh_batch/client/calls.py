"""Each call of the client as a value: what is sent, and how the answer is read. Knows nothing about sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, Unpack

from openai import BaseModel, RequestOptions
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from bdh_batch.client.answers import Metrics, Score, ServerInfo, Text, TokenizerInfo, Tokens
from bdh_batch.client.wishes import ChatWishes, CompletionWishes, Prompt, StreamOptions

Answer = TypeVar("Answer")
Messages = Iterable[ChatCompletionMessageParam]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request: a POST if it has a `body`, else a GET. `read` makes the answer of what came, which is a `kind`."""

    path: str
    kind: type[Any]
    read: Callable[[Any], Answer]
    body: Mapping[str, object] | None = None
    options: RequestOptions = field(default_factory=RequestOptions)


@dataclass(frozen=True)
class Streamed(Generic[Answer]):
    """A POST that is answered by a stream of chunks."""

    path: str
    kind: type[Answer]
    body: Mapping[str, object]
    options: RequestOptions


def complete(prompt: Prompt, *, deadline: float | None = None, **wishes: Unpack[CompletionWishes]) -> Call[Completion]:
    """Goes on from a prompt: text or token ids, or a list of either.

    Args:
        deadline: seconds that the server gives the request, `x-request-timeout`.
    """
    body = {"prompt": prompt, **wishes}
    return Call(COMPLETIONS, Completion, _itself(Completion), body, _within(deadline))


def chat(messages: Messages, *, deadline: float | None = None, **wishes: Unpack[ChatWishes]) -> Call[ChatCompletion]:
    """Answers a conversation.

    Args:
        deadline: as of `complete`.
    """
    body = {"messages": [*messages], **wishes}
    return Call(CHAT, ChatCompletion, _itself(ChatCompletion), body, _within(deadline))


def stream_complete(
    prompt: Prompt,
    *,
    options: StreamOptions | None = None,
    deadline: float | None = None,
    **wishes: Unpack[CompletionWishes],
) -> Streamed[Completion]:
    """As `complete`, in chunks as they come; to close the iterator ends the generation.

    Args:
        options: `stream_options`.
    """
    body = {"prompt": prompt, **wishes, "stream": True, "stream_options": options}
    return Streamed(COMPLETIONS, Completion, body, _within(deadline))


def stream_chat(
    messages: Messages,
    *,
    options: StreamOptions | None = None,
    deadline: float | None = None,
    **wishes: Unpack[ChatWishes],
) -> Streamed[ChatCompletionChunk]:
    """As `chat`, in chunks as they come; to close the iterator ends the generation.

    Args:
        options: `stream_options`.
    """
    body = {"messages": [*messages], **wishes, "stream": True, "stream_options": options}
    return Streamed(CHAT, ChatCompletionChunk, body, _within(deadline))


def score(text: str | Sequence[int], *, model: str | None = None) -> Call[Score]:
    """What the model says of a text, or of token ids; nothing is generated."""
    return Call(COMPLETIONS, Completion, lambda answer: Score.read(answer.choices[0]), _scored([text], model))


def score_all(texts: Sequence[str | Sequence[int]], *, model: str | None = None) -> Call[list[Score]]:
    """As `score`, of several texts in one request; the server bounds how many there may be (`limits.max_prompts`)."""

    def read(answer: Completion) -> list[Score]:
        return [Score.read(choice) for choice in answer.choices]

    return Call(COMPLETIONS, Completion, read, _scored(texts, model))


def tokenize(
    text: str, *, model: str | None = None, add_special_tokens: bool = True, return_token_strs: bool = False
) -> Call[Tokens]:
    """The token ids of a text; with `return_token_strs` also each token's text."""
    body = {"prompt": text, "add_special_tokens": add_special_tokens, "return_token_strs": return_token_strs}
    return Call("/tokenize", Tokens, _itself(Tokens), body | {"model": model})


def tokenize_chat(
    messages: Messages,
    *,
    model: str | None = None,
    tools: Iterable[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    return_token_strs: bool = False,
) -> Call[Tokens]:
    """The token ids of the prompt that the chat template makes of a conversation."""
    body: dict[str, object] = {"messages": [*messages], "model": model, "tools": tools and [*tools]}
    body |= {"add_generation_prompt": add_generation_prompt, "return_token_strs": return_token_strs}
    return Call("/tokenize", Tokens, _itself(Tokens), body)


def detokenize(tokens: Sequence[int], *, model: str | None = None) -> Call[str]:
    """The text of token ids."""
    body = {"tokens": tokens, "model": model}
    return Call("/detokenize", Text, lambda answer: str(answer.prompt), body)


def tokenizer_info() -> Call[TokenizerInfo]:
    """What the server tells of its tokenizer."""
    return Call("/tokenizer_info", TokenizerInfo, _itself(TokenizerInfo))


def server_info() -> Call[ServerInfo]:
    """The server's version, its model, and its settings."""
    return Call("/server_info", ServerInfo, _itself(ServerInfo))


def metrics() -> Call[Metrics]:
    """What /metrics tells at this moment."""
    return Call("/metrics", str, Metrics)


def health() -> Call[None]:
    """Nothing, if the server lives and makes progress.

    Raises:
        Unavailable: with the reason, where it does not.
    """
    return Call("/health", str, _nothing, options={"max_retries": 0})


def ready(*, timeout: float | None = None) -> Call[None]:
    """Nothing, if the server takes work.

    Args:
        timeout: seconds to wait for its answer; None is the client's.

    Raises:
        Unavailable: with the reason, while it loads or drains.
    """
    options: RequestOptions = {"max_retries": 0}
    return Call("/readyz", str, _nothing, options=options if timeout is None else {**options, "timeout": timeout})


Model = TypeVar("Model", bound=BaseModel)


def _itself(kind: type[Model]) -> Callable[[Any], Model]:
    def read(answer: Any) -> Model:
        assert isinstance(answer, kind)
        return answer

    return read


def _nothing(answer: str) -> None:
    return None


def _within(deadline: float | None) -> RequestOptions:
    return {} if deadline is None else {"headers": {"x-request-timeout": str(deadline)}}


def _scored(prompts: Sequence[str | Sequence[int]], model: str | None) -> dict[str, object]:
    return {"prompt": prompts, "model": model, "echo": True, "logprobs": 1, "max_tokens": 0}
