"""The types of the Responses API's responses, for the OpenAPI document; tests hold real responses to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, RootModel

from bdh_batch.http.docs.response_parts import Count, ResponseModel
from bdh_batch.http.docs.response_types import SchemaWarning, TokenLogprob

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(ResponseModel):
    """A part of a message: text."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[JsonValue], Field(max_length=0)]
    logprobs: list[TokenLogprob] = Field(description="With `include`; else empty.")


class InputText(ResponseModel):
    """A part of a message of the input: text."""

    type: Literal["input_text"]
    text: str


class MessageItem(ResponseModel):
    """An item: a message."""

    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["user", "assistant", "system", "developer"]
    content: list[Annotated[OutputText | InputText, Field(discriminator="type")]]
    phase: Literal["commentary", "final_answer"] = Field(default_factory=lambda: "final_answer")


class FunctionCallItem(ResponseModel):
    """An item: a call of a function."""

    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class FunctionCallOutputItem(ResponseModel):
    """An item: the output of a function."""

    type: Literal["function_call_output"]
    id: str
    status: ItemStatus
    call_id: str
    output: str


OutputItem = Annotated[MessageItem | FunctionCallItem, Field(discriminator="type")]
AnyItem = Annotated[MessageItem | FunctionCallItem | FunctionCallOutputItem, Field(discriminator="type")]


class InputTokensDetails(ResponseModel):
    """The part of the prompt that did not have to be computed."""

    cached_tokens: Count
    cache_write_tokens: Literal[0]


class OutputTokensDetails(ResponseModel):
    """The part of the output that is no text."""

    reasoning_tokens: Count = Field(description="Latent steps.")


class ResponseUsage(ResponseModel):
    """The tokens that a request used."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count
    estimated: bool = Field(default_factory=bool, description="Whether the numbers are estimates, of an upstream.")


class ResponseProblem(ResponseModel):
    """Why a response has failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(ResponseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens", "content_filter"]


class Reasoning(ResponseModel):
    """What was asked of the model before its response."""

    effort: str | None
    summary: None


class ShownText(ResponseModel):
    """What the text had to look like."""

    format: dict[str, JsonValue]


class ResponseObject(ResponseModel):
    """The response of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Unix seconds.")
    completed_at: int | None = Field(description="Unix seconds; null unless it is completed.")
    status: Status
    background: bool
    error: ResponseProblem | None
    frequency_penalty: float
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool = Field(description="Whether it is stored.")
    temperature: float
    text: ShownText
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: Count
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = Field(description="Null until it has ended.")
    user: str | None
    warnings: list[SchemaWarning] = Field(
        default_factory=list, description="What was left out of schemas that are not strict; absent if nothing."
    )


class NumberedEvent(ResponseModel):
    """What all events of a stream have."""

    sequence_number: Count


class ResponseStateEvent(NumberedEvent):
    """The response itself: it has begun, goes on, or has ended."""

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class OutputItemEvent(NumberedEvent):
    """An output item begins, or has ended."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Count
    item: OutputItem


class ContentPartEvent(NumberedEvent):
    """A part of a message begins, or has ended."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: Count
    content_index: Literal[0]
    part: OutputText


class OutputTextDelta(NumberedEvent):
    """More of a text."""

    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: Count
    content_index: Literal[0]
    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(NumberedEvent):
    """All of a text."""

    type: Literal["response.output_text.done"]
    item_id: str
    output_index: Count
    content_index: Literal[0]
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDelta(NumberedEvent):
    """More of the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: Count
    delta: str


class ArgumentsDone(NumberedEvent):
    """All of the arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: Count
    name: str
    arguments: str


class EventProblem(ResponseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEvent(NumberedEvent):
    """The response fails; response.failed follows."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
    error: EventProblem


class ResponseEvent(
    RootModel[
        Annotated[
            ResponseStateEvent
            | OutputItemEvent
            | ContentPartEvent
            | OutputTextDelta
            | OutputTextDone
            | ArgumentsDelta
            | ArgumentsDone
            | ErrorEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a stream; its `event` is its `type`."""


class ResponseDeleted(ResponseModel):
    """The response of a deletion."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseSummary(ResponseModel):
    """What a list shows of a stored response."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    previous_response_id: str | None
    metadata: dict[str, str]
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None


class ResponseList(ResponseModel):
    """A page of the caller's stored responses, the newest first."""

    object: Literal["list"]
    data: list[ResponseSummary]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputItemList(ResponseModel):
    """A page of the items that a response was made of."""

    object: Literal["list"]
    data: list[AnyItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseInputTokens(ResponseModel):
    """The response of /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"]
    input_tokens: Count
