"""Each call of the client as a value: what is sent, and how the response is read. Knows nothing about sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, Unpack

from openai import BaseModel, RequestOptions
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from bdh_batch.client.errors import ServerFailed
from bdh_batch.client.parameters import ChatParameters, CompletionParameters, Prompt, StreamOptions
from bdh_batch.client.responses import Metrics, Score, ServerInfo, Text, TokenizerInfo, Tokens

Result = TypeVar("Result")
Messages = Iterable[ChatCompletionMessageParam]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One request: a POST if it has a `body`, else a GET, unless it has a `method`. `read` makes the result of the
    response, a `kind`."""

    path: str
    kind: type[Any]
    read: Callable[[Any], Result]
    body: Mapping[str, object] | None = None
    options: RequestOptions = field(default_factory=RequestOptions)
    method: Literal["delete"] | None = None


@dataclass(frozen=True)
class Streamed(Generic[Result]):
    """A POST that is answered by a stream of chunks."""

    path: str
    kind: type[Result]
    body: Mapping[str, object]
    options: RequestOptions


def complete(
    prompt: Prompt, *, deadline: float | None = None, **parameters: Unpack[CompletionParameters]
) -> Call[Completion]:
    """Completes a prompt: text or token ids, or a list of either.

    Args:
        deadline: seconds that the server gives the request, `x-request-timeout`.
    """
    body = {"prompt": prompt, **parameters}
    return Call(COMPLETIONS, Completion, itself(Completion), body, _within(deadline))


def chat(
    messages: Messages, *, deadline: float | None = None, **parameters: Unpack[ChatParameters]
) -> Call[ChatCompletion]:
    """Continues a conversation.

    Args:
        deadline: as of `complete`.
    """
    body = {"messages": [*messages], **parameters}
    return Call(CHAT, ChatCompletion, itself(ChatCompletion), body, _within(deadline))


def stream_complete(
    prompt: Prompt,
    *,
    options: StreamOptions | None = None,
    deadline: float | None = None,
    **parameters: Unpack[CompletionParameters],
) -> Streamed[Completion]:
    """As `complete`, in chunks as they come; to close the iterator ends the generation.

    Args:
        options: `stream_options`.
    """
    body = {"prompt": prompt, **parameters, "stream": True, "stream_options": options}
    return Streamed(COMPLETIONS, Completion, body, _within(deadline))


def stream_chat(
    messages: Messages,
    *,
    options: StreamOptions | None = None,
    deadline: float | None = None,
    **parameters: Unpack[ChatParameters],
) -> Streamed[ChatCompletionChunk]:
    """As `chat`, in chunks as they come; to close the iterator ends the generation.

    Args:
        options: `stream_options`.
    """
    body = {"messages": [*messages], **parameters, "stream": True, "stream_options": options}
    return Streamed(CHAT, ChatCompletionChunk, body, _within(deadline))


def score(text: str | Sequence[int], *, model: str | None = None) -> Call[Score]:
    """What the model says of a text, or of token ids; nothing is generated."""
    return Call(COMPLETIONS, Completion, lambda response: Score.read(response.choices[0]), _scored([text], model))


def score_all(texts: Sequence[str | Sequence[int]], *, model: str | None = None) -> Call[list[Score]]:
    """As `score`, of several texts in one request; the server bounds how many there may be (`limits.max_prompts`)."""

    def read(response: Completion) -> list[Score]:
        return [Score.read(choice) for choice in response.choices]

    return Call(COMPLETIONS, Completion, read, _scored(texts, model))


def tokenize(
    text: str, *, model: str | None = None, add_special_tokens: bool = True, return_token_strs: bool = False
) -> Call[Tokens]:
    """The token ids of a text; with `return_token_strs` also each token's text."""
    body = {"prompt": text, "add_special_tokens": add_special_tokens, "return_token_strs": return_token_strs}
    return Call("/tokenize", Tokens, itself(Tokens), body | {"model": model})


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
    return Call("/tokenize", Tokens, itself(Tokens), body)


def detokenize(tokens: Sequence[int], *, model: str | None = None) -> Call[str]:
    """The text of token ids."""
    body = {"tokens": tokens, "model": model}
    return Call("/detokenize", Text, lambda response: str(response.prompt), body)


def tokenizer_info() -> Call[TokenizerInfo]:
    """What the server reports of its tokenizer."""
    return Call("/tokenizer_info", TokenizerInfo, itself(TokenizerInfo))


def server_info() -> Call[ServerInfo]:
    """The server's version, its model, and its settings."""
    return Call("/server_info", ServerInfo, itself(ServerInfo))


def metrics() -> Call[Metrics]:
    """What /metrics reports at this moment."""
    return Call("/metrics", str, Metrics)


def health() -> Call[None]:
    """Nothing, if the server lives and makes progress.

    Raises:
        Unavailable: with the reason, where it does not.
    """
    return Call("/health", str, nothing, options={"max_retries": 0})


def ready(*, timeout: float | None = None) -> Call[None]:
    """Nothing, if the server takes work.

    Args:
        timeout: seconds to wait for its response; None is the client's.

    Raises:
        Unavailable: with the reason, while it loads or drains.
    """
    options: RequestOptions = {"max_retries": 0}
    return Call("/readyz", str, nothing, options=options if timeout is None else {**options, "timeout": timeout})


Model = TypeVar("Model", bound=BaseModel)


def itself(kind: type[Model]) -> Callable[[Any], Model]:
    def read(response: Any) -> Model:
        if not isinstance(response, kind):  # some other server's, or a proxy's
            raise ServerFailed(f"The response is no JSON object, but {response!r:.200}.")
        return response

    return read


def nothing(response: object) -> None:
    return None


def _within(deadline: float | None) -> RequestOptions:
    return {} if deadline is None else {"headers": {"x-request-timeout": str(deadline)}}


def _scored(prompts: Sequence[str | Sequence[int]], model: str | None) -> dict[str, object]:
    return {"prompt": prompts, "model": model, "echo": True, "logprobs": 1, "max_tokens": 0}
