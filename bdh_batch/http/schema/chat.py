"""Messages as they come over the wire, and how the template makes a prompt of them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from bdh_batch.http.request.sizes import AnyJson, AtMost, BodyText, FreeObject, Label, passed_on
from bdh_batch.http.request.strict import Neutral, Open, Read, Wire, shallow
from bdh_batch.http.schema.history import PastCall, PastFunction
from bdh_batch.http.schema.tools import Tools
from bdh_batch.text.chat import RESERVED, Conversation

# What a part of a message is called, to the field that has its text.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
NEED_CONTENT = ("system", "developer", "user", "tool")


class TextPart(Wire):
    """A text part of the content of a message."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"type": {"const": "refusal"}}},
            "then": {"required": ["refusal"], "properties": {"refusal": {"type": "string"}}},
            "else": {"required": ["text"], "properties": {"text": {"type": "string"}}},
        }
    )
    unsupported: ClassVar[Neutral] = {"prompt_cache_breakpoint": ()}
    relayed: ClassVar[frozenset[str]] = frozenset(unsupported)

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: BodyText | None = None
    refusal: BodyText | None = None
    # Labels: what clients add for other servers, or send back as it came.
    annotations: AnyJson = None
    cache_control: AnyJson = None
    logprobs: AnyJson = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: object, info: ValidationInfo) -> object:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(kind, str) and kind not in TEXTS:
            if passed_on(info) is not None:
                return {"type": "text", "text": ""}  # what the message says here; the part goes on as it came
            raise PydanticCustomError("unsupported", f"Content parts of type {reprlib.repr(kind)} are not supported")
        return part

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if getattr(self, TEXTS[self.type]) is None:
            raise PydanticCustomError("text", "Input should be a valid string", {"field": TEXTS[self.type]})
        return self

    @property
    def said(self) -> str:
        text: str = getattr(self, TEXTS[self.type])
        return text


def _text(value: object, parts: Callable[[list[object]], list[TextPart]]) -> object:
    """Message content as a string: text parts are joined."""
    if isinstance(value, list):
        listed = [{"type": "text", "text": part} if isinstance(part, str) else part for part in value]
        return "".join(part.said for part in parts(listed))
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
PartsOrTexts = Annotated[list[TextPart | BodyText], AtMost("max_parts")]
Content = Annotated[str | None, Read(_text, Parts, BodyText | PartsOrTexts | None)]

BY_ROLE: JsonDict = {
    "allOf": [
        {
            "if": {"properties": {"role": {"enum": [*NEED_CONTENT]}}},
            "then": {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
        },
        {"if": {"properties": {"role": {"const": "assistant"}}}, "then": {"minProperties": 2}},
        {
            "if": {"properties": {"role": {"const": "tool"}}},
            "then": {"required": ["tool_call_id"], "properties": {"tool_call_id": {"type": "string"}}},
        },
        {
            "if": {"properties": {"role": {"not": {"const": "assistant"}}}},
            "then": {"properties": {"tool_calls": {"maxItems": 0}, "function_call": {"type": "null"}}},
        },
    ]
}


class Message(Open):
    """One message. Roles and fields that OpenAI does not define go to the template."""

    model_config = ConfigDict(json_schema_extra=BY_ROLE)
    unsupported: ClassVar[Neutral] = {"audio": ()}

    role: Annotated[Label, Field(min_length=1)]
    content: Content = None
    name: Label | None = None
    refusal: BodyText | None = None
    tool_call_id: Label | None = None
    tool_calls: Annotated[list[PastCall], AtMost("max_tools")] | None = None
    function_call: PastFunction | None = None
    parsed: AnyJson = None  # a label: what an official client made of the content of a response

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        for field in ("tool_calls", "function_call"):
            if getattr(self, field) and self.role != "assistant":
                raise PydanticCustomError("calls", "Only the assistant calls tools", {"field": field})
        says_nothing = self.role == "assistant" and self.model_fields_set == {"role"} and not self.others
        if says_nothing or (self.content is None and self.role in NEED_CONTENT):
            raise PydanticCustomError("content", "Input should be a valid string", {"field": "content"})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError(
                "call", "A tool message should have the tool_call_id that it responds to", {"field": "tool_call_id"}
            )
        return self

    def for_template(self) -> dict[str, Any]:
        role = "tool" if self.role == "function" else self.role  # what OpenAI called a tool's message before
        rendered: dict[str, Any] = {"role": role, "content": self.content or self.refusal or ""}
        known = {"name": self.name, "tool_call_id": self.tool_call_id, "refusal": self.refusal}
        rendered |= {name: value for name, value in known.items() if value is not None}
        rendered |= self.others
        calls = [call.for_template() for call in self.tool_calls or ()]
        if not calls and self.function_call is not None:
            calls = [{"type": "function", "function": self.function_call.for_template()}]
        return rendered | {"tool_calls": calls} if calls else rendered


class ConversationBody(Tools):
    """A body with messages, of which the template makes a prompt."""

    # The default of `add_generation_prompt`: whether the prompt ends where the assistant's response begins.
    ends_with_generation_prompt: ClassVar[bool] = True

    messages: Annotated[list[Message], Field(min_length=1), AtMost("max_messages")]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            text = "Cannot be used with add_generation_prompt"
            raise PydanticCustomError("both", text, {"field": "continue_final_message"})
        return self

    def conversation(self) -> Conversation:
        goes_on = bool(self.continue_final_message)
        asked = self.ends_with_generation_prompt if self.add_generation_prompt is None else self.add_generation_prompt
        tools = {"tools": [tool.model_dump(exclude_none=True) for tool in self.tools]} if self.tools else {}
        return Conversation(
            [message.for_template() for message in self.messages],
            add_generation_prompt=asked and not goes_on,
            continue_final=goes_on,
            variables={**(self.chat_template_kwargs or {}), **tools},
            add_special=self.add_special_tokens,
        )
