"""Parses the bytes of a body into its type: strict types, bounded parts, and one error that names the field."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, TypeVar

import orjson
from pydantic import ValidationError
from starlette.requests import Request

from bdh_batch.errors import InvalidRequest, UnknownParameter, UnsupportedParameter
from bdh_batch.http.request.json_text import ExceedsLimit, deeper, read_json
from bdh_batch.http.request.sizes import Context
from bdh_batch.http.request.strict import Wire
from bdh_batch.http.schema.other_names import hint
from bdh_batch.settings import Limits, Settings

Body = TypeVar("Body", bound=Wire)

LONGEST_NAME = 128  # characters of a field's name that an error repeats
KEY = "[key]"  # the last part of pydantic's location where it is the name of a member that is wrong
NO_OBJECT = "Input should be an object"  # in JSON's words, and without the name of the class


def parse(raw: bytes, kind: type[Body], limits: Limits, unknown_fields: Literal["refuse", "ignore"] = "refuse") -> Body:
    """A request body, checked.

    Raises:
        InvalidRequest: not JSON, too large in one of its parts, or a field that does not fit; it is named.
    """
    return check(read_object(raw, limits), kind, limits, unknown_fields)


def check(
    values: dict[str, Any],
    kind: type[Body],
    limits: Limits,
    unknown_fields: Literal["refuse", "ignore"] = "refuse",
    passed_on: Collection[str] | None = None,
) -> Body:
    """The values of a body in its type.

    Args:
        passed_on: see `Context`.

    Raises:
        InvalidRequest: a field does not fit; it is named.
    """
    extra: Literal["ignore", "forbid"] = "ignore" if unknown_fields == "ignore" else "forbid"
    try:
        return kind.model_validate(values, extra=extra, context=Context(limits, passed_on))
    except ValidationError as error:
        raise _invalid(error, kind.hints) from error


def read_object(raw: bytes, limits: Limits) -> dict[str, Any]:
    """Raises InvalidRequest where `raw` is not a JSON object, or is one with too much in it."""
    try:
        values = read_json(raw, limits)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    except ExceedsLimit as error:
        members = error.values.items() if isinstance(error.values, dict) else ()
        field = next((_path((name,)) for name, value in members if deeper(value, limits.max_depth - 1)), None)
        raise InvalidRequest(f"{field or 'The body'} {error}.", field) from error
    if not isinstance(values, dict):
        raise InvalidRequest("The body should be a JSON object.")
    return values


def _invalid(error: ValidationError, hints: bool) -> InvalidRequest:
    problem = error.errors(include_url=False, include_input=False)[0]
    context = problem.get("ctx", {})
    # Validators of a whole object or list say in their context which part of it they mean.
    location = problem["loc"]
    of_name = location[-1:] == (KEY,)
    location = location[:-1] if of_name else location
    param = _path((*location, *(context[key] for key in ("field", "index") if key in context)))
    instead = f" {text}" if hints and (text := hint(param)) else ""
    if problem["type"] == "extra_forbidden":
        text = (
            f"Unknown parameter: {param}.{instead} Where the server's option api.unknown_fields is ignore, it passes."
        )
        return UnknownParameter(text, param)
    if problem["type"] == "unsupported":
        return UnsupportedParameter(f"{problem['msg']}.{instead}", param)
    text = NO_OBJECT if problem["type"] in ("dict_type", "model_type") else problem["msg"]
    return InvalidRequest(f"{param}{' (its name)' if of_name else ''}: {text}", param)


def _path(location: tuple[int | str, ...]) -> str:
    """('messages', 2, 'content') to 'messages[2].content'. Names that a client made up may be long, and are cut."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{_brief(part)}" for part in location)
    return path.removeprefix(".")


def _brief(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"


def check_query(request: Request, settings: Settings, *known: str) -> None:
    """Raises UnknownParameter: what comes behind the `?` of the address has other names than these, or lists of
    them (`name[]`)."""
    if settings.api.unknown_fields == "refuse":
        for name in request.query_params:
            if name.removesuffix("[]") not in known:
                raise UnknownParameter(f"Unknown parameter: {name[:LONGEST_NAME]!r}.", name[:LONGEST_NAME])
