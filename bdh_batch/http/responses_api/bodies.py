"""The request bodies of the Responses API: their shapes. What else there is to check, the chat body that is made of
them checks (`translation.py`)."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from bdh_batch.http.request.sizes import AtMost, BodyText, FreeObject, FunctionLabel, Label
from bdh_batch.http.request.strict import Neutral, Read, Wire
from bdh_batch.http.schema.chat import Content, TemplateVariables
from bdh_batch.http.schema.requests import MAX_CHUNK, MAX_LOGPROBS, SamplingFields

LOGPROBS = "message.output_text.logprobs"
MAX_CALLS = 1024
# Fields of the API that are not built, and the values besides null that ask for nothing.
INPUT: Neutral = dict.fromkeys(("conversation", "personality", "prompt"), ())
CREATE: Neutral = {
    **INPUT,
    **dict.fromkeys(("access_programs", "image", "moderation", "prompt_cache_options"), ()),
    "context_management": ([],),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "service_tier": ("auto", "default"),
}
# By the type of an item: the fields that it needs, and those that it may have. Ids and statuses come back as they were.
FIELDS: Mapping[str, tuple[Collection[str], Collection[str]]] = {
    "message": (("role", "content"), ("id", "status", "phase")),
    "function_call": (("call_id", "name", "arguments"), ("id", "status")),
    "function_call_output": (("call_id", "output"), ("id", "status", "name")),
    "item_reference": (("id",), ()),
}


class InputItem(Wire):
    """An item of the input: a message, a call of a function, the output of one, or the name of an earlier item."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": {"properties": {"type": {"const": kind}}},
                    "then": {
                        "required": [*needed],
                        "properties": {
                            **{name: {"not": {"type": "null"}} for name in needed},
                            **{
                                name: {"type": "null"}
                                for name in ("id", "role", "content", "call_id", "name", "arguments", "output")
                                if name not in (*needed, *possible)
                            },
                        },
                    },
                }
                for kind, (needed, possible) in FIELDS.items()
            ]
        }
    )
    unsupported: ClassVar[Neutral] = {"caller": ({"type": "direct"},), "namespace": (), "async": (False,)}

    type: Literal["message", "function_call", "function_call_output", "item_reference"] = "message"
    id: Label | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content = None
    call_id: Label | None = None
    name: Label | None = None
    arguments: BodyText | None = None
    output: Content = None
    # Labels: accepted, and returned as they came.
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_type(cls, item: object) -> object:
        if not isinstance(item, dict):
            return item
        kind = item.get("type")
        if isinstance(kind, str) and kind not in FIELDS:
            raise PydanticCustomError("unsupported", f"Items of type {reprlib.repr(kind)} are not supported")
        if kind is None:
            return {**item, "type": "message" if "role" in item else "item_reference"}
        return item

    @model_validator(mode="after")
    def _has_the_fields_of_its_type(self) -> Self:
        needed, possible = FIELDS[self.type]
        for name in type(self).names - {"type"}:
            if getattr(self, name) is not None and name not in (*needed, *possible):
                text = f"Cannot be used in an item of type {self.type}"
                raise PydanticCustomError("item", text, {"field": name})
        for name in needed:
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", "Field required", {"field": name})
        return self


InputItems = Annotated[list[InputItem], AtMost("max_messages")]


def _input(value: object, items: Callable[[list[object]], list[InputItem]]) -> object:
    if isinstance(value, list):
        return items(value)
    if isinstance(value, str):
        return value
    raise PydanticCustomError("input", "Input should be a string or a list of items")


class ResponseFunction(Wire):
    """A function that the model may call."""

    unsupported: ClassVar[Neutral] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: FunctionLabel
    description: BodyText | None = None
    parameters: FreeObject | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_the_clients(cls, tool: object) -> object:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise PydanticCustomError("unsupported", f"Tools of type {reprlib.repr(kind)} are not supported")
        return tool


class ChosenFunction(Wire):
    """The name of a function that has to, or may, be called."""

    type: Literal["function"]
    name: Label


class ToolSelection(Wire):
    """A `tool_choice` that is more than a word: one function, or those of the tools that may be called."""

    type: Literal["function", "allowed_tools"]
    name: Label | None = None
    mode: Literal["auto", "required", "none"] | None = None
    tools: Annotated[list[ChosenFunction], Field(min_length=1), AtMost("max_tools")] | None = None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        needed, others = ("name", ("mode", "tools")) if self.type == "function" else ("tools", ("name",))
        if getattr(self, needed) is None:
            raise PydanticCustomError("missing", "Field required", {"field": needed})
        for name in others:
            if getattr(self, name) is not None:
                raise PydanticCustomError("choice", f"Cannot be used with the type {self.type}", {"field": name})
        return self


MODES = ("none", "auto", "required")


def _choice(value: object, selection: Callable[[object], ToolSelection]) -> object:
    if isinstance(value, dict):
        return selection(value)
    if value is None or (isinstance(value, str) and value in MODES):
        return value
    raise PydanticCustomError("choice", "Input should be 'none', 'auto', 'required', a function or allowed tools")


AnySelection = Literal["none", "auto", "required"] | ToolSelection | None


class TextFormat(Wire):
    """The field `text.format`: what the text has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionLabel | None = None
    description: BodyText | None = None
    schema_: FreeObject | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_a_schema_where_it_needs_one(self) -> Self:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise PydanticCustomError("missing", "Field required", {"field": name})
            if self.type != "json_schema" and value is not None:
                raise PydanticCustomError("format", "Can only be used with the type json_schema", {"field": name})
        return self


class TextOptions(Wire):
    """The field `text`."""

    unsupported: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningOptions(Wire):
    """The field `reasoning`."""

    unsupported: ClassVar[Neutral] = {
        "context": ("auto",),
        "generate_summary": (),
        "mode": ("standard",),
        "summary": (),
    }

    effort: Annotated[Label, Field(min_length=1)] | None = None


class ResponseStreamOptions(Wire):
    """The field `stream_options` of a response."""

    # The last event has the usage in any case.
    unsupported: ClassVar[Neutral] = {"include_obfuscation": (False,), "include_usage": (True, False)}

    chunk_tokens: int | None = Field(None, ge=1, le=MAX_CHUNK)


class InputTokensBody(Wire):
    """The body of a request to /v1/responses/input_tokens."""

    unsupported: ClassVar[Neutral] = INPUT
    hints: ClassVar[bool] = False

    model: Label | None = None
    input: Annotated[str | list[InputItem], Read(_input, InputItems, BodyText | InputItems)]
    instructions: BodyText | None = None
    previous_response_id: Label | None = None
    state: Label | None = None
    tools: Annotated[list[ResponseFunction], AtMost("max_tools")] | None = None
    tool_choice: Annotated[Any, Read(_choice, ToolSelection, AnySelection)] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.state is not None and self.previous_response_id is not None:
            raise PydanticCustomError("state", "Cannot be used with previous_response_id", {"field": "state"})
        return self


# Parts of items that no response here has: who includes them asks for nothing.
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
INCLUDED: tuple[str, ...] = get_args(Include)
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponseBody(InputTokensBody, SamplingFields):
    """The body of a request to /v1/responses."""

    unsupported: ClassVar[Neutral] = CREATE

    background: bool | None = None
    include: Annotated[list[Include], Field(max_length=8)] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, ge=1, le=MAX_CALLS)
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: TemplateVariables | None = None
    # Labels: accepted, and returned as they came.
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    user: Label | None = None
    _written: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _as_it_came(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(values)
        if isinstance(values, dict):
            made._written = values
        return made

    @model_validator(mode="after")
    def _fields_go_together(self) -> Self:
        if self.background and self.store is False:
            raise PydanticCustomError("background", "Cannot be used with store: false", {"field": "background"})
        if self.stream_options is not None and not self.stream:
            text = "Can only be used with stream: true"
            raise PydanticCustomError("stream_options", text, {"field": "stream_options"})
        return self

    @property
    def written(self) -> Mapping[str, Any]:
        """The fields as they came."""
        return self._written

    @property
    def logprobs(self) -> bool:
        """Whether the response has the tokens' log-probabilities."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())
