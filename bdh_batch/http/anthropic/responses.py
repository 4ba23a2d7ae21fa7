"""The types of the Messages API's responses, for the OpenAPI document; tests hold real responses to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from bdh_batch.http.docs.response_parts import Count, ResponseModel
from bdh_batch.http.docs.response_types import SchemaWarning

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]
WARNINGS = "What was left out of schemas that are not strict; absent where there is nothing."


class ProblemDetails(ResponseModel):
    """Tells Anthropic's clients to send the request without `thread`."""

    error_code: Literal["thread_unsupported_request"]
    unsupported: list[str]


class AnthropicProblem(ResponseModel):
    """What was wrong."""

    type: str
    message: str
    param: str | None = Field(description="The field at fault, as in `messages[2].content`.")
    code: str | None
    details: ProblemDetails | None = Field(
        default_factory=lambda: None, description="Where `thread` is refused; else absent."
    )


class AnthropicError(ResponseModel):
    """The body of every error below /v1/messages, and the last event of a stream that fails."""

    type: Literal["error"]
    error: AnthropicProblem
    request_id: str


class MessageUsage(ResponseModel):
    """The tokens that a request used."""

    input_tokens: Count = Field(description="Of the prompt, without those of the prefix cache.")
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: Count = Field(description="Of the prompt, those that came from the prefix cache.")
    output_tokens: Count
    estimated: bool = Field(default_factory=bool, description="Whether the numbers are estimates, of an upstream.")


class MessageText(ResponseModel):
    """A content block: text."""

    type: Literal["text"]
    text: str


class MessageToolUse(ResponseModel):
    """A content block: the use of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


MessageBlock = Annotated[MessageText | MessageToolUse, Field(discriminator="type")]


class MessageHead(ResponseModel):
    """What a message and the first event of one have in common."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None = Field(description="The stop sequence that ended it, if one did.")
    usage: MessageUsage
    warnings: list[SchemaWarning] = Field(default_factory=list, description=WARNINGS)


class MessageResponse(MessageHead):
    """The response of /v1/messages."""

    stop_reason: StopReason


class MessageStart(ResponseModel):
    """The first event: the message, still empty."""

    type: Literal["message_start"]
    message: MessageHead


class ContentBlockStart(ResponseModel):
    """A content block begins."""

    type: Literal["content_block_start"]
    index: Count
    content_block: MessageBlock


class TextDelta(ResponseModel):
    """More of a text."""

    type: Literal["text_delta"]
    text: str


class InputJsonDelta(ResponseModel):
    """More of the JSON of an input."""

    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(ResponseModel):
    """More of a content block."""

    type: Literal["content_block_delta"]
    index: Count
    delta: Annotated[TextDelta | InputJsonDelta, Field(discriminator="type")]


class ContentBlockStop(ResponseModel):
    """A content block has ended."""

    type: Literal["content_block_stop"]
    index: Count


class MessageStop(ResponseModel):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(ResponseModel):
    """The message has ended."""

    type: Literal["message_delta"]
    delta: MessageStop
    usage: MessageUsage


class EndOfMessage(ResponseModel):
    """An event that has nothing to say: the last one, or one of a silence."""

    type: Literal["message_stop", "ping"]


class MessageEvent(
    RootModel[
        Annotated[
            MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | EndOfMessage,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of a stream; its `event` is its `type`."""


class InputTokens(ResponseModel):
    """The response of /v1/messages/count_tokens."""

    input_tokens: Count
