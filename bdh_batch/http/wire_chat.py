"""Messages as they come over the wire, and how the template makes a prompt of them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from bdh_batch.http.sizes import AnyJson, AtMost, BodyText, FreeObject, Label
from bdh_batch.http.strict import Neutral, Read, Wire, shallow
from bdh_batch.http.wire_tools import ToolCall, Tools
from bdh_batch.text.chat import RESERVED, Conversation

MESSAGE: Neutral = {"refusal": (), "audio": (), "function_call": (), "annotations": ([],)}


class TextPart(Wire):
    unsupported: ClassVar[Neutral] = {"prompt_cache_breakpoint": ()}

    type: Literal["text"]
    text: BodyText

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: object) -> object:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise PydanticCustomError("unsupported", f"Content parts of type {reprlib.repr(kind)} are not supported")
        return part


def _text(value: object, parts: Callable[[list[object]], list[TextPart]]) -> object:
    """Message content as a string: text parts are joined."""
    if isinstance(value, list):
        return "".join(part.text for part in parts(value))
    if value is None or isinstance(value, str):
        return value
    raise PydanticCustomError("content", "Input should be a string or a list of text parts")


def _not_reserved(values: dict[str, Any]) -> dict[str, Any]:
    for name in values.keys() & RESERVED:
        raise PydanticCustomError("reserved", "Cannot be set here", {"field": name})
    return values


TemplateVariables = Annotated[
    FreeObject,
    BeforeValidator(shallow, json_schema_input_type=FreeObject),
    AfterValidator(_not_reserved),
    Field(json_schema_extra={"propertyNames": {"not": {"enum": sorted(RESERVED)}}}),
]
Parts = Annotated[list[TextPart], AtMost("max_parts")]
Content = Annotated[str | None, Read(_text, Parts, BodyText | Parts | None)]


SAYS_SOMETHING: JsonDict = {
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
        {
            "required": ["tool_calls"],
            "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}},
        },
    ],
    "if": {"properties": {"role": {"const": "tool"}}},
    "then": {"required": ["tool_call_id"], "properties": {"tool_call_id": {"type": "string"}}},
}


class Message(Wire):
    model_config = ConfigDict(json_schema_extra=SAYS_SOMETHING)
    unsupported = MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: Label | None = None
    tool_call_id: Label | None = None
    tool_calls: Annotated[list[ToolCall], AtMost("max_tools")] | None = None
    parsed: AnyJson = None  # a label: what an official client made of the content of an answer

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("calls", "Only the assistant calls tools", {"field": "tool_calls"})
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "Input should be a valid string", {"field": "content"})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("call", "A tool's message says which call it answers", {"field": "tool_call_id"})
        return self

    def for_template(self) -> dict[str, Any]:
        told = self.model_dump(exclude_none=True, exclude={"tool_calls", "parsed"}) | {"content": self.content or ""}
        if self.role == "function":  # what "tool" was called before
            told["role"] = "tool"
        if self.tool_calls:
            told["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return told


class ConversationBody(Tools):
    """A body with messages, of which the template makes a prompt."""

    messages: Annotated[list[Message], Field(min_length=1), AtMost("max_messages")]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            text = "Cannot go with add_generation_prompt"
            raise PydanticCustomError("both", text, {"field": "continue_final_message"})
        return self

    def conversation(self) -> Conversation:
        goes_on = bool(self.continue_final_message)
        tools = {"tools": [tool.model_dump(exclude_none=True) for tool in self.tools]} if self.tools else {}
        return Conversation(
            [message.for_template() for message in self.messages],
            add_generation_prompt=self.add_generation_prompt is not False and not goes_on,
            continue_final=goes_on,
            variables={**(self.chat_template_kwargs or {}), **tools},
            add_special=self.add_special_tokens,
        )
