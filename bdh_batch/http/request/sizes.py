"""Bounds the parts of a body. Each bound is an option of `limits`, which the error names where it is exceeded.

Each list, string and free object of a body's types has a bound (`AtMost`), or says that only the body's own size is one
(`BodyText`, `AnyJson`). The OpenAPI document shows the bounds of the settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from bdh_batch.http.request.json_text import ExceedsLimit, read_json
from bdh_batch.settings import Limits

MARK = "x-limit"  # in a JSON schema: the option that bounds it, until `show_limits` has put its value there
UTF8 = 4  # bytes of a character, at most
KEYWORDS = {"array": "maxItems", "object": "maxProperties", "string": "maxLength", "integer": "maximum"}


@dataclass(frozen=True, slots=True)
class Context:
    """What holds for a body that is being validated.

    Args:
        passed_on: fields that its model takes although this server does not know them. None: the body is for a model of
            this server's own, or for one that is not given what clients wrote.
    """

    limits: Limits
    passed_on: Collection[str] | None = None


def limits_of(info: ValidationInfo) -> Limits:
    """The limits that hold for a body that is being validated: those of its context, or else the defaults."""
    return info.context.limits if isinstance(info.context, Context) else Limits()


def passed_on(info: ValidationInfo) -> Collection[str] | None:
    """See `Context`."""
    return info.context.passed_on if isinstance(info.context, Context) else None


@dataclass(frozen=True, slots=True)
class AtMost:
    """Bounds a list's items, an object's members, a string's characters or a number, by an option of `limits`.

    An option whose name ends in `_bytes` bounds the UTF-8 of a string or the JSON of an object. The size is checked
    before anything inside is looked at, and the first item that is wrong ends the validation of its list.
    """

    option: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "list":
            schema = {**schema, "fail_fast": True}
        return core_schema.with_info_before_validator_function(self.check, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        if json_schema.get("type") != "object" or not self.option.endswith("_bytes"):  # which JSON Schema cannot say
            json_schema[MARK] = self.option
        return json_schema

    def check(self, value: object, info: ValidationInfo) -> object:
        most: int = getattr(limits_of(info), self.option)
        exceeded = self._bytes_exceed(value, most) if self.option.endswith("_bytes") else _size(value) > most
        if exceeded:
            unit = _unit(value, self.option.endswith("_bytes"))
            raise PydanticCustomError("limit", f"Input should {unit} (limits.{self.option})", {"most": most})
        return value

    @staticmethod
    def _bytes_exceed(value: object, most: int) -> bool:
        if isinstance(value, str):
            return len(value) > most or (len(value) * UTF8 > most and len(value.encode()) > most)
        return isinstance(value, dict) and len(orjson.dumps(value)) > most


def _size(value: object) -> int:
    return value if isinstance(value, int) else len(value) if isinstance(value, list | dict | str) else 0


def _unit(value: object, in_bytes: bool) -> str:
    if isinstance(value, int):
        return "be at most {most}"
    kind = "bytes" if in_bytes else "characters" if isinstance(value, str) else "items"
    return f"have at most {{most}} {kind}"


Label = Annotated[str, AtMost("max_label_length")]
FunctionLabel = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$", max_length=128)]
# Text is as long as a body that holds it can be; so is a list of token ids.
BodyText = Annotated[str, Field(json_schema_extra={MARK: "max_body_bytes"})]
BodyTokens = Annotated[list[Annotated[int, Field(ge=0)]], AtMost("max_values")]
# A JSON value of which the server looks at nothing; the body's `max_values`, `max_containers` and `max_depth` bound it.
AnyJson = Annotated[Any, Field(json_schema_extra={MARK: "max_values"})]
FreeObject = Annotated[dict[str, Any], AtMost("max_members")]


def from_string(text: str, info: ValidationInfo) -> Any:
    """The values of JSON that comes as a string in a body, and has the body's bounds. Raises JSONDecodeError."""
    try:
        return read_json(text.encode(), limits_of(info))
    except ExceedsLimit as error:
        raise PydanticCustomError("limit", "Input {problem}", {"problem": str(error)}) from error


def show_limits(schema: object, limits: Limits) -> None:
    """Puts the values of `limits` into a JSON schema, in place of the marks, wherever in it they are."""
    for each in _objects(schema):
        if isinstance(option := each.pop(MARK, None), str):
            for kind in (each, *each.get("anyOf", ())):
                if (keyword := KEYWORDS.get(kind.get("type"))) is not None:
                    kind[keyword] = getattr(limits, option)


def _objects(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item)
