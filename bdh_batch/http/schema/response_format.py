"""The fields of a body that ask for structured output: `response_format`, `structured_outputs`, `guided_…`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.sizes import AtMost, BodyText, FreeObject, FunctionLabel, from_string
from bdh_batch.http.request.strict import Neutral, Wire
from bdh_batch.text.sources import ANY_OBJECT, Source, from_choice, from_lark, from_regex, from_schema


def _schema(value: object, info: ValidationInfo) -> object:
    """A schema may come as a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return from_string(value, info)
    except orjson.JSONDecodeError as error:
        raise PydanticCustomError("schema", "This is not JSON: {error}", {"error": str(error)}) from error


MostBytes = AtMost("max_schema_bytes")
SchemaObject = Annotated[FreeObject, MostBytes]
SchemaText = Annotated[str, MostBytes]
Schema = Annotated[
    SchemaObject,
    BeforeValidator(_schema, json_schema_input_type=SchemaText | SchemaObject),
    BeforeValidator(MostBytes.check),
]
Choice = Annotated[list[SchemaText], Field(min_length=1), AtMost("max_choices")]


class NamedSchema(Wire):
    """The field `response_format.json_schema`."""

    name: FunctionLabel | None = None
    description: BodyText | None = None
    schema_: SchemaObject | None = Field(None, alias="schema")
    strict: bool | None = None  # whether what cannot be kept to is refused, and not left out


GO_TOGETHER: JsonDict = {
    "if": {"properties": {"type": {"const": "json_schema"}}},
    "then": {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
    "else": {"properties": {"json_schema": {"type": "null"}}},
    "allOf": [
        {
            "if": {"properties": {"schema": {"type": "object"}}, "required": ["schema"]},
            "then": {"properties": {"type": {"const": "json_object"}}},
        }
    ],
}


class ResponseFormat(Wire):
    """The field `response_format`, as in OpenAI's API."""

    model_config = ConfigDict(json_schema_extra=GO_TOGETHER)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: SchemaObject | None = Field(None, alias="schema")  # llama.cpp's, of json_object

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "format",
                "json_schema can only be used with the type json_schema, which requires it",
                {"field": "json_schema"},
            )
        if self.schema_ is not None and self.type != "json_object":
            raise PydanticCustomError("format", "Can only be used with the type json_object", {"field": "schema"})
        return self

    def source(self) -> Source | None:
        """None where any text will do."""
        if self.type == "text":
            return None
        if self.schema_ is not None:
            return from_schema({**ANY_OBJECT, **self.schema_}, "response_format.schema")
        named = self.json_schema or NamedSchema()
        schema = ANY_OBJECT if named.schema_ is None else named.schema_
        return from_schema(schema, "response_format.json_schema.schema", bool(named.strict))


class StructuredOutputs(Wire):
    """The field `structured_outputs`, as in vLLM."""

    # What vLLM's own class has beside these, with its defaults.
    unsupported: ClassVar[Neutral] = {
        **dict.fromkeys(("structural_tag", "whitespace_pattern", "_backend"), ()),
        "disable_fallback": (False,),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "_backend_was_auto": (False,),
    }

    json_: Schema | None = Field(None, alias="json")
    regex: SchemaText | None = None
    choice: Choice | None = None
    grammar: SchemaText | None = None


class Formatted(Wire):
    """A body that can say what its responses have to look like, in one of several ways."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: SchemaText | None = None
    guided_choice: Choice | None = None
    guided_grammar: SchemaText | None = None

    def structured_output(self) -> Source | None:
        """What `response_format` asks for."""
        return None if self.response_format is None else self.response_format.source()

    def source(self) -> Source | None:
        """The grammar that responses have to follow.

        Raises:
            InvalidRequest: several are asked for, or one that cannot be written down.
        """
        sources = [*self._structured(), *self._guided()]
        if (structured_output := self.structured_output()) is not None:
            sources.append(structured_output)
        if len(sources) > 1:
            raise InvalidRequest(f"{sources[1].param} cannot be used with {sources[0].param}.", sources[1].param)
        return sources[0] if sources else None

    def _structured(self) -> list[Source]:
        asked = self.structured_outputs or StructuredOutputs()
        return _sources("structured_outputs.", asked.json_, asked.regex, asked.choice, asked.grammar)

    def _guided(self) -> list[Source]:
        return _sources("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)


def _sources(
    prefix: str, schema: dict[str, Any] | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[Source]:
    found = []
    if schema is not None:
        found.append(from_schema(schema, f"{prefix}json"))
    if regex is not None:
        found.append(from_regex(regex, f"{prefix}regex"))
    if choice is not None:
        found.append(from_choice(choice, f"{prefix}choice"))
    if grammar is not None:
        found.append(from_lark(grammar, f"{prefix}grammar"))
    return found
