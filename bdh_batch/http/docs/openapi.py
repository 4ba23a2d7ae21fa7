"""The OpenAPI document: what can be asked and what is answered, by the types that check the one and describe the other.

What JSON Schema cannot say, such as which fields exclude one another, is a 400 with the field's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from bdh_batch import __version__
from bdh_batch.http.auth.rates import HEADERS as RATE_HEADERS
from bdh_batch.http.docs.endpoint import Endpoint
from bdh_batch.http.docs.field_help import BODIES, defaults, help_of
from bdh_batch.http.docs.parameters import PARAMETERS, QUERY
from bdh_batch.http.docs.response_types import Error
from bdh_batch.http.endpoints import ENDPOINTS, TAGS, open_paths
from bdh_batch.http.request.sizes import show_limits
from bdh_batch.http.request.strict import Wire
from bdh_batch.settings import Limits, Settings

Json = dict[str, Any]

REFUSALS = {
    400: "Malformed HTTP or JSON, a wrong type, or a value out of range; `param` names the field.",
    401: "The key is missing or wrong (`invalid_api_key`).",
    403: "A key that may not do this.",
    404: "No such model, or no such response or state (any more).",
    409: "The model is still in use.",
    408: "The request came too slowly, or waited past its deadline.",
    413: "The body is larger than `limits.max_body_bytes`, perhaps once it is decompressed; a file: than "
    "`store.max_state_bytes`.",
    415: "The body is not JSON by its `content-type`, or in another coding than gzip and deflate.",
    429: "Too many requests or tokens of this key (`rate_limit_exceeded`), or too many requests wait (`queue_full`).",
    431: "The headers are larger than `limits.max_header_bytes`.",
    500: "A fault of the server, whose log has the reason under the request's id.",
    502: "The upstream server of this model failed, and no other could take over.",
    503: "The model is loading, the server is draining, the engine is down, or `limits.max_buffered_bytes` are held.",
    504: "The request ran past its deadline, or the upstream server of this model was too slow.",
    507: "What is to be stored is larger than the store, or the caller's part of it, may be.",
}
DONE = "[DONE]"
ANYWHERE = (400, 408, 431, 500)
INTRODUCTION = (
    "Continuous batching for BDH models, with an OpenAI-compatible API. Null is as good as leaving a field out. "
    "Integers are written without a fraction. Errors that the schemas do not express, such as fields that exclude "
    "one another, have the status 400."
)


class _Untitled(GenerateJsonSchema):
    """Fields go by their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def openapi(settings: Settings) -> Json:
    """The document of a server with these settings, in OpenAPI 3.1."""
    known = [each for each in ENDPOINTS if each.documented]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bdh_batch",
            "version": __version__,
            "description": INTRODUCTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": _paths(known, settings),
        "components": {
            "schemas": _schemas(known, settings),
            "responses": {
                _refusal_name(status, error): _refusal(status, error)
                for error in dict.fromkeys(each.error for each in known)
                for status in REFUSALS
            },
            "headers": HEADERS,
            "parameters": PARAMETERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
            },
        },
    }


def _text_header(text: str, **schema: Any) -> Json:
    return {"description": text, "schema": {"type": "string", **schema}}


HEADERS: Json = {
    "x-request-id": _text_header("The client's own, if it sent a valid one, or a new one."),
    "openai-processing-ms": {"description": "Milliseconds until the response began.", "schema": {"type": "integer"}},
    "retry-after": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}},
    "www-authenticate": _text_header("The authentication scheme.", const="Bearer"),
    **{name: _text_header("Where the caller stands, if it is limited.") for name in RATE_HEADERS},
}


def _paths(known: Iterable[Endpoint], settings: Settings) -> Json:
    open_to_all = open_paths(settings.auth)
    paths: Json = {}
    for operation in known:
        closed = operation.path not in open_to_all
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, closed, settings.auth.enabled)
    return paths


def _operation(operation: Endpoint, closed: bool, keys: bool) -> Json:
    """`closed`: whether it requires a key, where there are `keys`."""
    kind = {"Responses": "response", "States": "state"}.get(operation.tag, "model")
    wanted = [name for name in (kind, "version") if f"{{{PARAMETERS[name]['name']}}}" in operation.path]
    wanted += ["x-request-id", "x-request-timeout"] if operation.generates else ["x-request-id"]
    described: Json = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in wanted]
        + [QUERY[name] for name in operation.query],
        "responses": {"200": _response(operation)} | _refusals(operation, closed),
    }
    if operation.description:
        described["description"] = operation.description
    if operation.bodies:
        schemas = [_ref(body) for body in operation.bodies]
        content = {
            "schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas},
            "examples": {name: {"value": value} for name, value in operation.requests.items()},
        }
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    if operation.upload is not None:
        file = {operation.upload: {"schema": {"type": "string", "format": "binary"}}}
        described["requestBody"] = {"required": True, "content": file}
    if closed and keys:
        described["security"] = [{"bearer": []}, {"x-api-key": []}]
    return described


def _response(operation: Endpoint) -> Json:
    response: Json = {"description": "It went well.", "headers": _headers()}
    if isinstance(operation.response, str):
        response["content"] = {operation.response: {"schema": {"type": "string"}}}
    elif operation.response is not None:
        examples = {name: {"value": value} for name, value in operation.replies.items()}
        whole = {"schema": _ref(operation.response)} | ({"examples": examples} if examples else {})
        response["content"] = {"application/json": whole} | _events(operation)
    elif operation.event is not None:
        response["content"] = _events(operation)
    return response


def _events(operation: Endpoint) -> Json:
    """What `stream` makes of it. OpenAPI 3.1 does not say what a schema of events is of; most tools take it for one."""
    if operation.event is None:
        return {}
    name, error = operation.event.__name__, operation.error.__name__
    chunk = {"oneOf": [_ref(operation.event), _ref(operation.error)]}
    data: list[Json] = [{"type": "string", "contentMediaType": "application/json", "contentSchema": chunk}]
    if operation.last_event == DONE:
        data.append({"const": DONE})
    schema = {
        "type": "object",
        "description": f"One server-sent event: a {name}; the last is {operation.last_event}. What fails after the "
        f"first has a last event that is of the type {error}.",
        "properties": {"data": {"anyOf": data}},
        "required": ["data"],
    }
    return {"text/event-stream": {"schema": schema}}


def _refusals(operation: Endpoint, closed: bool) -> Json:
    statuses = {
        *ANYWHERE,
        *operation.errors,
        *((401, 429) if closed else ()),
        *((413, 415) if operation.bodies or operation.upload else ()),
    }
    names = {status: _refusal_name(status, operation.error) for status in sorted(statuses)}
    return {str(status): {"$ref": f"#/components/responses/{name}"} for status, name in names.items()}


def _refusal_name(status: int, error: type[BaseModel]) -> str:
    return str(status) if error is Error else f"{error.__name__}-{status}"


def _refusal(status: int, error: type[BaseModel]) -> Json:
    more = {401: ["www-authenticate"], 429: ["retry-after"], 503: ["retry-after"]}.get(status, [])
    return {
        "description": REFUSALS[status],
        "headers": _headers(*more),
        "content": {"application/json": {"schema": _ref(error)}},
    }


def _headers(*more: str) -> Json:
    names = ("x-request-id", "openai-processing-ms", *more, *RATE_HEADERS)
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schemas(known: Iterable[Endpoint], settings: Settings) -> Json:
    types: set[type[BaseModel]] = set()
    for each in known:
        types.update(kind for kind in (each.response, each.event, each.error, *each.bodies) if isinstance(kind, type))
    _, made = models_json_schema(
        [(kind, "validation") for kind in sorted(types, key=lambda kind: kind.__name__)],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Untitled,
    )
    schemas: Json = made["$defs"]
    for name in _requested(schemas, [kind.__name__ for kind in types if issubclass(kind, Wire)]):
        _explain(name, schemas[name])
        if settings.api.unknown_fields == "ignore":
            schemas[name].pop("additionalProperties", None)
    for name in BODIES:
        _set_defaults(schemas[name], defaults(settings.generation))
    _limit(schemas, settings.limits, settings.model.max_model_len)
    return schemas


def _requested(schemas: Json, names: Iterable[str]) -> set[str]:
    """The names of all schemas that those of these `names` refer to, and themselves."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _referred(schemas[name])
    return found


def _referred(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(reference := value.get("$ref"), str):
            yield reference.rpartition("/")[2]
        for item in value.values():
            yield from _referred(item)
    elif isinstance(value, list):
        for item in value:
            yield from _referred(item)


def _explain(name: str, schema: Json) -> None:
    for field, described in schema.get("properties", {}).items():
        if "description" not in described:
            described["description"] = help_of(name, field)
        if described.get("default", "") is None:
            del described["default"]  # null says what leaving it out says


def _set_defaults(schema: Json, known: Mapping[str, float | bool]) -> None:
    for field in known.keys() & schema["properties"].keys() - set(schema.get("required", ())):
        schema["properties"][field]["default"] = known[field]


def _limit(schemas: Json, limits: Limits, max_model_len: int | None) -> None:
    """What the settings, not the types, say."""
    show_limits(schemas, limits)
    if max_model_len is not None:
        for fields in (
            schemas[name]["properties"] for name in ("CompletionBody", "ChatBody", "MessagesBody", "ResponseBody")
        ):
            for field in {"max_tokens", "max_completion_tokens", "max_output_tokens"} & fields.keys():
                _bound(fields[field], "integer", maximum=max_model_len)


def _bound(schema: Json, type: str, **bounds: int) -> None:
    for kind in _kinds(schema):
        if kind.get("type") == type:
            kind.update(bounds)


def _kinds(schema: Json) -> Iterator[Json]:
    """What a value may be."""
    if "anyOf" not in schema:
        yield schema
    for kind in schema.get("anyOf", ()):
        yield from _kinds(kind)
