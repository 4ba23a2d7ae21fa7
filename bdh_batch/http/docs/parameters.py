"""The parameters beside bodies: in headers, in paths, and behind `?` in addresses. Forms begin with their examples."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def _integer(least: int, most: int | None = None, default: int | None = None) -> Json:
    bounds = {"minimum": least, "maximum": most, "default": default}
    return {"type": "integer"} | {name: value for name, value in bounds.items() if value is not None}


PARAMETERS: Json = {
    "x-request-id": {
        "name": "x-request-id",
        "in": "header",
        "description": "Names the request, in the response and in the log; others are replaced.",
        "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,128}$"},
        "example": "my-request-1",
    },
    "x-request-timeout": {
        "name": "x-request-timeout",
        "in": "header",
        "description": "Seconds within which the response has to be complete.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
        "example": 30,
    },
    "model": {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The name of a model.",
        "schema": {"type": "string", "minLength": 1},
        "example": "bdh-shakespeare",
    },
    "response": {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The id of a response.",
        "schema": {"type": "string", "minLength": 1},
        "example": "resp_0a2be8cf1f4b4c52a44dd7c9f0f5d1e4",
    },
    "state": {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The id of a state.",
        "schema": {"type": "string", "minLength": 1},
        "example": "st_0a2be8cf1f4b4c52a44dd7c9f0f5d1e4",
    },
    "version": {
        "name": "version",
        "in": "path",
        "required": True,
        "description": "The version of the model (kserve.model_version).",
        "schema": {"type": "string", "minLength": 1},
        "example": "1",
    },
}

TEXT: Json = {"type": "string", "minLength": 1}
DIRECTION: Json = {"type": "string", "enum": ["asc", "desc"], "default": "desc"}
WAIT: Json = {"type": "number", "minimum": 0, "maximum": 10, "default": 0.2}
OPTIONAL: dict[str, tuple[str, Json, object]] = {  # what they are, their schemas, and an example or None
    "model": ("The name of a model; the first one if left out.", TEXT, "bdh-shakespeare"),
    "limit": ("How many a page has at most.", _integer(1, 100, 20), 20),
    "after": ("The id behind which the page begins.", TEXT, None),
    "order": ("Of the items; `desc` is the last first.", DIRECTION, None),
    "stream": ("Whether to send the events of a response in the background.", {"type": "boolean"}, None),
    "starting_after": ("With `stream`: the number of the event behind which to begin.", _integer(0), None),
    "ttl": ("The seconds for which the state is kept.", {"type": "number", "exclusiveMinimum": 0}, None),
    "steps": ("How many steps are waited for.", _integer(1, 200, 32), 32),
    "seconds": ("How long steps are waited for.", WAIT, 0.2),
}
REQUIRED = ("layer", "head", "neuron")

QUERY: Json = {
    name: {"name": name, "in": "query", "description": text, "schema": schema}
    | ({} if example is None else {"example": example})
    for name, (text, schema, example) in OPTIONAL.items()
} | {
    name: {
        "name": name,
        "in": "query",
        "required": True,
        "description": f"The number of the {name}, from 0.",
        "schema": _integer(0),
        "example": 0,
    }
    for name in REQUIRED
}
