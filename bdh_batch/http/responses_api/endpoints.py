"""The rows of the Responses API in the table of endpoints."""

from __future__ import annotations

from typing import Any

from bdh_batch.http.docs.endpoint import MODEL, UPSTREAM, WORK, Endpoint
from bdh_batch.http.responses_api.bodies import InputTokensBody, ResponseBody
from bdh_batch.http.responses_api.responses import (
    InputItemList,
    ResponseDeleted,
    ResponseEvent,
    ResponseInputTokens,
    ResponseList,
    ResponseObject,
)

_ENTER: dict[str, Any] = {
    "type": "function",
    "name": "enter",
    "parameters": {
        "type": "object",
        "properties": {"who": {"enum": ["Romeo", "Juliet"]}},
        "required": ["who"],
        "additionalProperties": False,
    },
}
_ASKED: dict[str, Any] = {"input": "Who is there?", "max_output_tokens": 24}
ROOT = "/v1/responses"
ONE = f"{ROOT}/{{id}}"


def responses() -> list[Endpoint]:
    text = "With `stream`, the response is server-sent events. With `background`, it goes on without its client."
    return [
        Endpoint(
            *("createResponse", "responses.create", "Responses", ROOT, "Continue a conversation", ResponseObject),
            method="post",
            description=text,
            bodies=[ResponseBody],
            event=ResponseEvent,
            errors=MODEL + WORK + UPSTREAM,
            requests={
                "text": {**_ASKED, "temperature": 0},
                "stream": {**_ASKED, "stream": True},
                "tools": {**_ASKED, "tools": [_ENTER], "tool_choice": "required", "max_output_tokens": 80},
            },
        ),
        Endpoint(
            *("listResponses", "responses.stored.list", "Responses", ROOT),
            *("The caller's stored responses, the newest first", ResponseList),
            description="Without their texts, in pages.",
            query=("limit", "after"),
            errors=(404,),
        ),
        Endpoint(
            *("countInputTokens", "responses.count", "Responses", f"{ROOT}/input_tokens"),
            *("Count the tokens of an input", ResponseInputTokens),
            method="post",
            bodies=[InputTokensBody],
            errors=MODEL,
            requests={"text": {"instructions": "You are Romeo.", "input": "Who is there?"}},
        ),
        Endpoint(
            *("getResponse", "responses.stored.retrieve", "Responses", ONE, "A stored response", ResponseObject),
            query=("stream", "starting_after"),
            event=ResponseEvent,
            errors=(404,),
        ),
        Endpoint(
            *(
                "deleteResponse",
                "responses.stored.delete",
                "Responses",
                ONE,
                "Delete a stored response",
                ResponseDeleted,
            ),
            method="delete",
            errors=(404,),
        ),
        Endpoint(
            *("cancelResponse", "responses.stored.cancel", "Responses", f"{ONE}/cancel"),
            *("Cancel a response in the background", ResponseObject),
            method="post",
            errors=(404,),
        ),
        Endpoint(
            *("listInputItems", "responses.stored.input_items", "Responses", f"{ONE}/input_items"),
            *("The items that a response was made of", InputItemList),
            query=("limit", "order", "after"),
            errors=(404,),
        ),
    ]
