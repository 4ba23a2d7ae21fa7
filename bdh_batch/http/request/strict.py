"""What all objects of a body have in common: strict types, no unknown fields, and unsupported ones refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from bdh_batch.http.request.json_text import deeper

Neutral = Mapping[str, tuple[Any, ...]]  # unsupported fields, and the values besides null that ask for nothing


MAX_DEPTH = 32


def shallow(value: object) -> object:
    """Refuses what is nested deep: templates and their filters walk values by recursion."""
    if deeper(value, MAX_DEPTH):
        raise PydanticCustomError("deep", "Values may be nested {most} deep", {"most": MAX_DEPTH})
    return value


@dataclass(frozen=True, slots=True)
class Read:
    """Marks a field that comes as one of several `kinds`: `how` makes its value of what came.

    Of the `kinds`, `how` is given the validator of the one that has parts of its own, whose problems are then told in
    their places, and of that kind alone.
    """

    how: Callable[[Any, Callable[[Any], Any]], Any]
    parts: Any
    kinds: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            self.how,
            handler.generate_schema(self.parts),
            json_schema_input_schema=handler.generate_schema(self.kinds),
            serialization=core_schema.simple_ser_schema("any"),
        )


class Wire(BaseModel):
    """An object of a body. `unsupported` fields are refused by name, or dropped where they ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    unsupported: ClassVar[Neutral] = {}
    names: ClassVar[frozenset[str]] = frozenset()  # of the fields, as they are written in JSON

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.names = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _with_known_fields(cls, values: object) -> object:
        """Without the unsupported fields, and with one unknown one if there are any: one is enough for an error."""
        if not isinstance(values, dict):
            return values
        for name in cls.unsupported.keys() & values.keys():
            if values[name] is not None and not _asks_for_nothing(values[name], cls.unsupported[name]):
                text = "{field} is not supported by this server"
                raise PydanticCustomError("unsupported", text, {"field": name})
        kept = {name: values[name] for name in cls.names & values.keys()}
        for name in values:
            if name not in cls.names and name not in cls.unsupported:
                return kept | {name: values[name]}
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, neutral in cls.unsupported.items():
            text = "Not supported: may only say what leaving it out would say."
            schema["properties"][name] = {"enum": [None, *neutral], "description": text}
        return schema


def _asks_for_nothing(value: object, neutral: tuple[Any, ...]) -> bool:
    # 1 == True in Python, but not in JSON.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)
