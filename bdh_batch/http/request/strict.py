"""The base of all objects of a body: strict types, no unknown fields, and unsupported ones refused by name.

Null is as good as leaving a field out, whether the field is known or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from bdh_batch.http.request.json_text import deeper
from bdh_batch.http.request.sizes import AtMost, passed_on

Neutral = Mapping[str, tuple[Any, ...]]  # unsupported fields, and the values besides null that ask for nothing

MAX_DEPTH = 32
TOO_DEEP = "Values may be nested {most} deep"


def shallow(value: object) -> object:
    """Refuses what is nested deep: templates and their filters walk values by recursion."""
    if deeper(value, MAX_DEPTH):
        raise PydanticCustomError("deep", TOO_DEEP, {"most": MAX_DEPTH})
    return value


@dataclass(frozen=True, slots=True)
class Read:
    """Marks a field that comes as one of several `kinds`: `how` makes its value of what came.

    Of the `kinds`, `how` is given the validator of the one that has parts of its own, whose problems are then reported
    by their own paths, and of that kind alone.
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
    relayed: ClassVar[frozenset[str]] = frozenset()  # those of them that a model has which is given what clients wrote
    names: ClassVar[frozenset[str]] = frozenset()  # of the fields, as they are written in JSON
    open: ClassVar[bool] = False  # whether unknown fields are left to a subclass
    hints: ClassVar[bool] = True  # whether errors say what OpenAI's API calls a field of another one

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.names = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _with_known_fields(cls, values: object, info: ValidationInfo) -> object:
        """Without the unsupported fields, and with one unknown one if there are any: one is enough for an error."""
        if not isinstance(values, dict):
            return values
        passed = frozenset() if passed_on(info) is None else cls.relayed
        for name in (cls.unsupported.keys() & values.keys()) - passed:
            if values[name] is not None and not _asks_for_nothing(values[name], cls.unsupported[name]):
                text = "{field} is not supported by this server"
                raise PydanticCustomError("unsupported", text, {"field": name})
        kept = {name: values[name] for name in cls.names & values.keys()}
        unknown = None if cls.open else next(cls._unknown(values), None)
        return kept if unknown is None else kept | {unknown: values[unknown]}

    @classmethod
    def _unknown(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """The names of the unknown fields that say something."""
        for name, value in values.items():
            if value is not None and name not in cls.names and name not in cls.unsupported:
                yield name

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, neutral in cls.unsupported.items():
            text = "Not supported: only the default value is accepted."
            schema["properties"][name] = {"enum": [None, *neutral], "description": text}
        schema["additionalProperties"] = True if cls.open else {"type": "null"}
        return schema


class Open(Wire):
    """An object of a conversation. Its unknown fields are kept in `others` for the chat template, as they came."""

    open = True
    _others: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def others(self) -> Mapping[str, Any]:
        return self._others

    @model_validator(mode="wrap")
    @classmethod
    def _with_others(cls, values: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        made = handler(values)
        if isinstance(values, dict):
            others = {name: values[name] for name in cls._unknown(values)}
            AtMost("max_members").check(others, info)
            for name, value in others.items():
                if deeper(value, MAX_DEPTH):
                    raise PydanticCustomError("deep", TOO_DEEP, {"most": MAX_DEPTH, "field": name})
            made._others = others
        return made


def _asks_for_nothing(value: object, neutral: tuple[Any, ...]) -> bool:
    # 1 == True in Python, but not in JSON.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)
