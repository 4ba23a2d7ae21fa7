"""The rows of the Messages API in the table of endpoints."""

from __future__ import annotations

from typing import Any

from bdh_batch.http.anthropic.bodies import CountTokensBody, MessagesBody
from bdh_batch.http.anthropic.responses import AnthropicError, InputTokens, MessageEvent, MessageResponse
from bdh_batch.http.docs.endpoint import MODEL, UPSTREAM, WORK, Endpoint
from bdh_batch.http.docs.examples import NAME, QUESTION

_ENTER: dict[str, Any] = {
    "name": "enter",
    "input_schema": {
        "type": "object",
        "properties": {"who": {"enum": ["Romeo", "Juliet"]}},
        "required": ["who"],
        "additionalProperties": False,
    },
}
_MESSAGE = {
    "id": "msg_0a2be8cf1f4b4c52a44dd7c9f0f5d1e4",
    "type": "message",
    "role": "assistant",
    "model": NAME,
    "content": [{"type": "text", "text": " the world of the countr"}],
    "stop_reason": "max_tokens",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 30,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 24,
    },
}


def messages() -> list[Endpoint]:
    return [
        Endpoint(
            "createMessage",
            "messages.create",
            "Messages",
            "/v1/messages",
            "Continue a conversation, as in Anthropic's API",
            MessageResponse,
            "post",
            "With `stream`, the response is server-sent events.",
            bodies=[MessagesBody],
            event=MessageEvent,
            last_event="message_stop",
            errors=MODEL + WORK + UPSTREAM,
            error=AnthropicError,
            requests={
                "conversation": {"messages": [QUESTION], "max_tokens": 24, "temperature": 0},
                "stream": {"messages": [QUESTION], "max_tokens": 24, "stream": True},
                "tools": {"messages": [QUESTION], "tools": [_ENTER], "tool_choice": {"type": "any"}, "max_tokens": 80},
            },
            replies={"conversation": _MESSAGE},
        ),
        Endpoint(
            "countMessageTokens",
            "messages.count_tokens",
            "Messages",
            "/v1/messages/count_tokens",
            "Count the tokens of a conversation",
            InputTokens,
            "post",
            bodies=[CountTokensBody],
            errors=MODEL,
            error=AnthropicError,
            requests={"conversation": {"system": "You are Romeo.", "messages": [QUESTION]}},
        ),
    ]
