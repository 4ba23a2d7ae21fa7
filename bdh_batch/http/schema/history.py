"""Calls of tools that were made before, as clients send them back: leniently, as models and other servers made them."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, PlainValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from bdh_batch.http.request.sizes import AnyJson, AtMost, BodyText, FreeObject, Label, from_string
from bdh_batch.http.request.strict import Open, shallow
from bdh_batch.system.documents import values_in


def _arguments(value: object, info: ValidationInfo) -> object:
    """As templates expect them, an object. None at all are an empty one; what is no JSON object stays the text it is:
    a model may have been cut off in the middle of it."""
    if value is None or isinstance(value, dict):
        return shallow(MOST_MEMBERS.check(value or {}, info))
    if not isinstance(value, str):
        raise PydanticCustomError("arguments", "Input should be a JSON object, as a string or as it is")
    try:
        values = from_string(value, info) if value.strip() else {}
    except orjson.JSONDecodeError:
        return value
    if values is None or values == []:  # what PHP makes of an empty object
        return {}
    return shallow(values) if isinstance(values, dict) and _is_exact(values, value) else value


def _is_exact(values: object, text: str) -> bool:
    """Whether all numbers are as they were written: integers of more than 64 bits, for one, are read as floats."""
    written: set[Decimal] | None = None
    for each in values_in(values):
        if isinstance(each, float):
            written = {Decimal(number) for number in NUMBER.findall(text)} if written is None else written
            if Decimal(repr(each)) not in written:
                return False
    return True


NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,4})?")
MOST_MEMBERS = AtMost("max_members")
Arguments = Annotated[
    dict[str, Any] | str, PlainValidator(_arguments, json_schema_input_type=BodyText | FreeObject | None)
]


class PastFunction(Open):
    """What was called, and with which arguments."""

    name: Label
    arguments: Arguments = Field(default_factory=dict)
    parsed_arguments: AnyJson = None  # a label, as all that official clients add to a response that they send back

    def for_template(self) -> dict[str, Any]:
        return {**self.others, "name": self.name, "arguments": self.arguments}


class PastCall(Open):
    """A call that the assistant made, sent back to it."""

    id: Label | None = None
    type: Literal["function"] | None = None
    function: PastFunction
    index: int | None = Field(None, ge=0)  # a label

    def for_template(self) -> dict[str, Any]:
        rendered = {**self.others, "type": "function", "function": self.function.for_template()}
        return rendered if self.id is None else {"id": self.id, **rendered}
