"""The parameters of requests, typed: OpenAI's that the server honours, vLLM's, and its own.

None of them need be there; what they mean and their ranges are in `docs/api.md` and in the server's errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from openai.types.chat import ChatCompletionToolChoiceOptionParam, ChatCompletionToolParam


class StructuredOutputs(TypedDict, total=False):
    """The structured output of a response: one of these; `json` is a schema, `grammar` is llguidance's Lark."""

    json: Mapping[str, Any] | str
    regex: str
    choice: Sequence[str]
    grammar: str


class StreamOptions(TypedDict, total=False):
    """What a stream contains besides text."""

    include_usage: bool
    continuous_usage_stats: bool
    chunk_tokens: int


class GenerationParameters(TypedDict, total=False):
    """The parameters that completions and chats have in common."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    priority: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    min_tokens: int
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int]
    skip_special_tokens: bool
    truncate_prompt_tokens: int
    prompt_logprobs: int
    neurons: Mapping[str, int]
    return_tokens_as_token_ids: bool
    cache_salt: str
    latent_steps: int
    update_latent_memory: bool
    reasoning_effort: str
    state: str
    return_token_ids: bool
    add_special_tokens: bool
    response_format: Mapping[str, Any]
    structured_outputs: StructuredOutputs
    user: str
    metadata: Mapping[str, Any]
    store: bool


class CompletionParameters(GenerationParameters, total=False):
    """The parameters of `complete`."""

    best_of: int
    echo: bool
    logprobs: int


class ChatParameters(GenerationParameters, total=False):
    """The parameters of `chat`."""

    max_completion_tokens: int
    logprobs: bool
    top_logprobs: int
    echo: bool
    tools: Iterable[ChatCompletionToolParam]
    tool_choice: ChatCompletionToolChoiceOptionParam
    parallel_tool_calls: bool
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any]


Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
