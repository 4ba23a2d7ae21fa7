"""The types of responses about states, for the OpenAPI document; tests hold real responses to them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bdh_batch.http.docs.response_parts import Count, ResponseModel


class StateObject(ResponseModel):
    """A saved state."""

    id: str
    object: Literal["state"]
    created_at: int = Field(description="Unix seconds.")
    expires_at: int = Field(description="Unix seconds.")
    model: str
    fingerprint: str = Field(description="Of the model's weights: with others, it cannot be used.")
    dtype: Literal["float32", "bfloat16"]
    tokens: Count = Field(description="That it has read.")
    bytes: Count = Field(
        description="Of its file; 0 where that made room for others: it is computed again when needed."
    )
    metadata: dict[str, str]


class StateList(ResponseModel):
    """A page of the caller's states, the newest first."""

    object: Literal["list"]
    data: list[StateObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StateDeleted(ResponseModel):
    """The response of a deletion."""

    id: str
    object: Literal["state"]
    deleted: Literal[True]
