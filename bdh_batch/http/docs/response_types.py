"""The types of responses. Responses are written by hand (`frames.py`, `embeddings.py`, …), for speed; these types
describe them in the OpenAPI document, and tests hold real responses to them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from bdh_batch.http.docs.response_parts import Count, ResponseModel, TokenNeurons, Usage

FinishReason = Literal["stop", "length", "content_filter"]
ChatFinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class SchemaWarning(ResponseModel):
    """A keyword of a schema that is not strict, and that the response may not keep to."""

    param: str = Field(description="The field of the request that the schema is in.")
    path: str = Field(description="Where in the schema, as a JSON pointer.")
    keyword: str
    text: str


class Envelope(ResponseModel):
    """The fields that all completions and chat completions have."""

    id: str
    created: int = Field(description="Unix seconds.")
    model: str
    system_fingerprint: str = Field(description="Names the model and the build.")
    warnings: list[SchemaWarning] = Field(
        default_factory=list,
        description="What was left out of schemas that are not strict; absent where there is nothing. In a stream, "
        "with the first event.",
    )


Tokens = list[Count]
PROMPT_TOKENS = "With `return_token_ids`: the prompt's; else null."
TOKENS = "With `return_token_ids`; else null."
NEURONS = "With `neurons`: of each token, with `echo` of the prompt's before them; else absent."
CHUNK_NEURONS = "With `neurons`: of the chunk's tokens; in the first chunk, with `echo`, after the prompt's."


class PromptLogprob(ResponseModel):
    """The log-probability of one prompt token."""

    logprob: float
    rank: int = Field(ge=1, description="How many tokens are at least as likely, itself included.")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
PROMPT_LOGPROBS = "With `prompt_logprobs`, by token id, null for the first token; else null."


class CompletionLogprobs(ResponseModel):
    """Columns, one row for each token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count] = Field(description="Where each token's text begins, in characters.")


class CompletionChoice(ResponseModel):
    """One choice of a completion."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | None = Field(description=PROMPT_LOGPROBS)
    prompt_token_ids: Tokens | None = Field(description=PROMPT_TOKENS)
    token_ids: Tokens | None = Field(description=TOKENS)
    neurons: list[TokenNeurons] = Field(default_factory=list, description=NEURONS)


class CompletionChunkChoice(ResponseModel):
    """A part of one choice, in a chunk of a stream."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: Tokens = Field(default_factory=list, description="With `return_token_ids`, in the first chunk.")
    token_ids: Tokens = Field(default_factory=list, description="With `return_token_ids`.")
    neurons: list[TokenNeurons] = Field(default_factory=list, description=CHUNK_NEURONS)


class Completion(Envelope):
    """The response of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Envelope):
    """One event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice] = Field(description="Empty in the chunk that contains the usage.")
    usage: Usage | None = Field(default_factory=lambda: None)


class Logprob(ResponseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None


class TokenLogprob(Logprob):
    """A sampled token, with the likeliest tokens at its position."""

    top_logprobs: list[Logprob]


class ChatLogprobs(ResponseModel):
    """The log-probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(ResponseModel):
    """The function that a tool call names, and its arguments."""

    name: str
    arguments: str = Field(description="A JSON object, as a string.")


class MadeCall(ResponseModel):
    """A tool call that the model made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(ResponseModel):
    """The message of a chat choice."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[MadeCall] = Field(default_factory=list)
    reasoning_content: str = Field(default_factory=str, description="The thoughts of an upstream's model.")


class ChatChoice(ResponseModel):
    """One choice of a chat completion."""

    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: Tokens | None = Field(description=TOKENS)
    neurons: list[TokenNeurons] = Field(default_factory=list, description=NEURONS)


class ChatCompletion(Envelope):
    """The response of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = Field(description=PROMPT_LOGPROBS)
    prompt_token_ids: Tokens | None = Field(description=PROMPT_TOKENS)


class FunctionCallDelta(ResponseModel):
    """A part of the function of a tool call."""

    name: str = Field("", description="With the first delta of a call.")
    arguments: str = Field(description="What comes next of them.")


class CallDelta(ResponseModel):
    """A part of a tool call, in a chunk of a stream."""

    index: Count
    id: str = Field("", description="With the first delta of a call.")
    type: Literal["function"] = "function"
    function: FunctionCallDelta


class ChatDelta(ResponseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] = Field("assistant", description="With the first delta of a choice.")
    content: str = ""
    tool_calls: list[CallDelta] = Field(default_factory=list)
    reasoning_content: str = Field("", description="What comes next of the thoughts of an upstream's model.")
    refusal: str | None = None


class ChatChunkChoice(ResponseModel):
    """A part of one chat choice, in a chunk of a stream."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: Tokens = Field(default_factory=list, description="With `return_token_ids`.")
    neurons: list[TokenNeurons] = Field(default_factory=list, description=CHUNK_NEURONS)


class ChatCompletionChunk(Envelope):
    """One event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice] = Field(description="Empty in the chunk that contains the usage.")
    usage: Usage | None = Field(default_factory=lambda: None)
    prompt_token_ids: Tokens = Field(default_factory=list, description="With `return_token_ids`, in the first chunk.")


class EmbeddingUsage(ResponseModel):
    """The tokens of the inputs."""

    prompt_tokens: Count
    total_tokens: Count


class Embedding(ResponseModel):
    """The vector of one input."""

    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str = Field(description="With base64: little-endian float32.")


class Embeddings(ResponseModel):
    """The response of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokenization(ResponseModel):
    """The response of /tokenize."""

    count: Count
    max_model_len: int | None
    tokens: list[Count]
    token_strs: list[str] | None = Field(description="With `return_token_strs`; else null.")


class Detokenization(ResponseModel):
    """The response of /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """With the tokenizer's other special tokens by name, where it has any."""

    model_config = ConfigDict(extra="allow", strict=True)

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: list[Count]
    prefix_token: str | None = Field(
        description="What a text can be scored after: that of its start, else of its end, else a newline. "
        "Harnesses that score texts from their first token on (rolling log-likelihoods) take it as prefix token."
    )
    prefix_token_id: Count | None = Field(description="Its id, as for lm-eval's `custom_prefix_token_id`.")
    vocab_size: Count


class ModelStatus(ResponseModel):
    """What a model is doing."""

    value: Literal["loaded", "loading", "unloaded", "unloading", "failed"]


class Success(ResponseModel):
    """The response of /models/load and /models/unload."""

    success: Literal[True]


class ModelCard(ResponseModel):
    """A model, as /v1/models lists it."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix seconds; fixed for a model.")
    owned_by: str
    root: str = Field(description="The model's name; another id is an alias of it.")
    max_model_len: int | None
    fingerprint: str | None = Field(
        description="Servers with the same one generate the same text for the same request and seed; null while the "
        "model is not loaded, and of upstreams."
    )
    status: ModelStatus


class ModelList(ResponseModel):
    """The response of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(ResponseModel):
    """The response of health and readiness probes."""

    status: Literal["ok", "ready"]


class Version(ResponseModel):
    """The response of /version."""

    version: str


class Load(ResponseModel):
    """The response of /load."""

    server_load: Count = Field(description="Requests under way in the engine.")


class EngineProcess(ResponseModel):
    """An engine process, as the front end that responds knows it."""

    name: str
    pid: int | None = Field(description="When the front end last connected to it; null before that.")
    model: str
    device: str | None = Field(description="Before that, as in the settings; null where engines have different ones.")
    state: str = Field(description="connecting, ready, leaving or unhealthy.")
    streams: int = Field(description="Requests of this front end that it computes.")


class ServerInfo(ResponseModel):
    """The response of /server_info."""

    version: str
    model: str
    config: dict[str, dict[str, JsonValue]]
    engines: list[EngineProcess] | None = Field(
        None, description="Engine processes, where there are some; for operators' keys."
    )


class Root(ResponseModel):
    """The response of /."""

    name: str
    version: str
    status: str = Field(description="ready, or why it is not.")


class ErrorDetail(ResponseModel):
    """What was wrong, as in OpenAI's API."""

    message: str
    type: str
    param: str | None = Field(description="The field at fault, as in `messages[2].content`.")
    code: str | None


class Error(ResponseModel):
    """The body of every error response."""

    error: ErrorDetail
