"""Responses and events as the Open Responses specification has them: types made from its OpenAPI document."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, get_args

import orjson
from openresponses_types import ResponseResource, __spec_version__, types
from pydantic import BaseModel

assert __spec_version__ == "2026-04-24"


def kind_of(event: type[BaseModel]) -> str:
    """What its `type` says."""
    annotation: Any = event.model_fields["type"].annotation
    (kind,) = annotation if isinstance(annotation, type) and issubclass(annotation, StrEnum) else get_args(annotation)
    return str(kind)


EVENTS = {kind_of(each): each for name, each in vars(types).items() if name.endswith("StreamingEvent")}


def check_event(event: dict[str, Any]) -> None:
    """Raises AssertionError, pydantic.ValidationError: it is none."""
    assert event["type"] in EVENTS
    if "response" in event:
        event = event | {"response": without_extensions(event["response"])}
    EVENTS[event["type"]].model_validate_json(orjson.dumps(event), strict=True)


def check_response(response: dict[str, Any]) -> None:
    """Raises pydantic.ValidationError: it is none."""
    ResponseResource.model_validate_json(orjson.dumps(without_extensions(response)), strict=True)


def without_extensions(response: dict[str, Any]) -> dict[str, Any]:
    """Without the two values that OpenAI's API has and these types lack: a schema that comes back with its format, and
    the effort "minimal"."""
    response, form, reasoning = dict(response), response["text"]["format"], response["reasoning"]
    if "schema" in form:
        response["text"] = {"format": form | {"schema": None}}
    if reasoning["effort"] == "minimal":
        response["reasoning"] = reasoning | {"effort": "low"}
    return response
