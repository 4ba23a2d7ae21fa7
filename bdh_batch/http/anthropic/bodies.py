"""The request bodies of the Messages API: their shapes. What else there is to check, the chat body that is made of them
checks (`translation.py`)."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from bdh_batch.http.request.sizes import AtMost, BodyText, FreeObject, FunctionLabel, Label, passed_on
from bdh_batch.http.request.strict import Neutral, Read, Wire
from bdh_batch.http.schema.requests import StopStrings

# What is done in any case: equal prefixes are found, for about so long.
CACHED = ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"})
# Fields of the API that are not built, and the values besides null that ask for nothing.
CONVERSATION: Neutral = {
    "cache_control": CACHED,
    **dict.fromkeys(("billing_policy", "compaction", "context_management", "user_profile_id", "workspace_id"), ()),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
}
MESSAGES: Neutral = {
    **CONVERSATION,
    **dict.fromkeys(("container", "diagnostics", "fallback_credit_token", "fallbacks", "inference_geo", "thread"), ()),
    "service_tier": ("auto", "standard_only"),
}
BLOCK: Neutral = {"cache_control": CACHED, "citations": ([],)}
Fields = Mapping[str, tuple[Collection[str], Collection[str]]]  # by a type: those it needs, and those it may have
IMAGE = "image"  # a block for models that are given what clients wrote: others have none, and the schema neither
RESULT_FIELDS: Fields = {"text": (("text",), ()), IMAGE: (("source",), ())}
FIELDS: Fields = {
    **RESULT_FIELDS,
    "tool_use": (("id", "name", "input"), ()),
    "tool_result": (("tool_use_id",), ("content", "is_error")),
}
SOURCE_FIELDS: Fields = {"base64": (("media_type", "data"), ()), "url": (("url",), ())}


def _by_type(fields: Fields) -> Callable[[JsonDict], None]:
    """Returns what completes the JSON schema of a block: which fields go with which type."""
    shown = {kind: each for kind, each in fields.items() if kind != IMAGE}
    needs = {name for needed, _ in shown.values() for name in needed}

    def properties(needed: Collection[str], possible: Collection[str]) -> JsonDict:
        names = [name for others, more in shown.values() for name in (*others, *more)]
        refused: JsonDict = {name: {"type": "null"} for name in names if name not in (*needed, *possible)}
        return {**{name: {"not": {"type": "null"}} for name in needs.intersection(needed)}, **refused}

    def complete(schema: JsonDict) -> None:
        listed: Any = schema["properties"]
        del listed["source"]
        listed["type"]["enum"].remove(IMAGE)
        schema["allOf"] = [
            {
                "if": {"properties": {"type": {"const": kind}}},
                "then": {"required": [*needed], "properties": properties(needed, possible)},
            }
            for kind, (needed, possible) in shown.items()
        ]

    return complete


def _known(value: object, what: str, known: Collection[str]) -> object:
    """Refuses an object by its type, where this is none of those that are `known`."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in known:
        raise PydanticCustomError("unsupported", f"{what} of type {reprlib.repr(kind)} are not supported")
    return value


class TextBlock(Wire):
    """A block of `system`."""

    unsupported = BLOCK

    type: Literal["text"]
    text: BodyText

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, block: object) -> object:
        return _known(block, "Content blocks", ("text",))


def _texts(value: object, blocks: Callable[[list[object]], list[TextBlock]]) -> object:
    """A text, which may come as blocks: these are joined."""
    if isinstance(value, list):
        return "".join(block.text for block in blocks(value))
    if value is None or isinstance(value, str):
        return value
    raise PydanticCustomError("content", "Input should be a string or a list of text blocks")


TextBlocks = Annotated[list[TextBlock], AtMost("max_parts")]
Texts = Annotated[str | None, Read(_texts, TextBlocks, BodyText | TextBlocks | None)]


class Typed(Wire):
    """The base of objects whose type says which fields they have."""

    kinds: ClassVar[str]  # what errors call them
    fields: ClassVar[Fields]

    type: Label

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, value: object, info: ValidationInfo) -> object:
        hidden = {IMAGE} if passed_on(info) is None else set()
        return _known(value, cls.kinds, cls.fields.keys() - hidden)

    @model_validator(mode="after")
    def _has_the_fields_of_its_type(self) -> Self:
        needed, possible = self.fields[self.type]
        for name in type(self).names - {"type"}:
            if getattr(self, name) is not None and name not in (*needed, *possible):
                text = f"Cannot be used with the type {self.type}"
                raise PydanticCustomError("type", text, {"field": name})
        for name in needed:
            if getattr(self, name) is None:
                raise PydanticCustomError("missing", "Field required", {"field": name})
        return self


class ImageSource(Typed):
    """Where the bytes of an image are: in the request, or at a URL."""

    kinds = "Image sources"
    fields = SOURCE_FIELDS

    type: Literal["base64", "url"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"] | None = None
    data: BodyText | None = None
    url: BodyText | None = None

    @property
    def location(self) -> str:
        """A URL that has the image in it, or where it is."""
        return f"data:{self.media_type};base64,{self.data}" if self.url is None else self.url


class ResultBlock(Typed):
    """A block of the content of a tool's result."""

    model_config = ConfigDict(json_schema_extra=_by_type(RESULT_FIELDS))
    unsupported: ClassVar[Neutral] = BLOCK
    kinds = "Content blocks"
    fields = RESULT_FIELDS

    type: Literal["text", "image"]
    text: BodyText | None = None
    source: ImageSource | None = None


def _result(value: object, blocks: Callable[[list[object]], list[ResultBlock]]) -> object:
    """Blocks as a text, where all are text, or as they are."""
    if isinstance(value, list):
        made = blocks(value)
        return "".join(block.text or "" for block in made) if all(block.source is None for block in made) else made
    return _texts(value, lambda _: [])


ResultBlocks = Annotated[list[ResultBlock], AtMost("max_parts")]
Result = Annotated[str | list[ResultBlock] | None, Read(_result, ResultBlocks, BodyText | ResultBlocks | None)]


class ContentBlock(Typed):
    """A block of the content of a message."""

    model_config = ConfigDict(json_schema_extra=_by_type(FIELDS))
    unsupported: ClassVar[Neutral] = {**BLOCK, "caller": ({"type": "direct"},), "toolset_name": ()}
    kinds = "Content blocks"
    fields = FIELDS

    type: Literal["text", "image", "tool_use", "tool_result"]
    text: BodyText | None = None
    source: ImageSource | None = None
    id: Label | None = None
    name: Label | None = None
    input: FreeObject | None = None
    tool_use_id: Label | None = None
    content: Result = None
    is_error: bool | None = None


def _content(value: object, blocks: Callable[[list[object]], list[ContentBlock]]) -> object:
    if isinstance(value, list):
        return blocks(value)
    if isinstance(value, str):
        return value
    raise PydanticCustomError("content", "Input should be a string or a list of content blocks")


Blocks = Annotated[list[ContentBlock], AtMost("max_parts")]
SPEAKERS = {"tool_use": "assistant", "tool_result": "user", IMAGE: "user"}


class InputMessage(Wire):
    """A message of the conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[str | list[ContentBlock], Read(_content, Blocks, BodyText | Blocks)]

    @model_validator(mode="after")
    def _says_what_its_role_may(self) -> Self:
        for index, block in enumerate(self.blocks):
            if self.role != SPEAKERS.get(block.type, self.role):
                text = f"A {block.type} block should be in a message of the {SPEAKERS[block.type]}"
                raise PydanticCustomError("role", text, {"field": "content", "index": index})
        return self

    @property
    def blocks(self) -> list[ContentBlock]:
        return [] if isinstance(self.content, str) else self.content


class CustomTool(Wire):
    """A tool that the model may use."""

    unsupported: ClassVar[Neutral] = {
        "allowed_callers": (["direct"],),
        "cache_control": CACHED,
        "defer_loading": (False,),
        "eager_input_streaming": (True, False),  # inputs come piece by piece in any case
        "input_examples": ([],),
    }

    type: Literal["custom"] | None = None
    name: FunctionLabel
    description: BodyText | None = None
    input_schema: FreeObject
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_the_clients(cls, tool: object) -> object:
        return _known(tool, "Tools", ("custom",))


class ToolUseChoice(Wire):
    """The field `tool_choice`."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"type": {"const": "tool"}}},
            "then": {"required": ["name"], "properties": {"name": {"type": "string"}}},
            "else": {"properties": {"name": {"type": "null"}}},
        }
    )

    type: Literal["auto", "any", "tool", "none"]
    name: Label | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool_where_it_has_to(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            text = "Field required" if self.type == "tool" else "Can only be used with the type tool"
            raise PydanticCustomError("name", text, {"field": "name"})
        return self


class JsonFormat(Wire):
    """The field `output_config.format`."""

    type: Literal["json_schema"]
    schema_: FreeObject = Field(alias="schema")


class OutputConfig(Wire):
    """The field `output_config`: what the response has to look like."""

    unsupported: ClassVar[Neutral] = {"effort": ("high",), "task_budget": ()}

    format: JsonFormat | None = None


class RequestMetadata(Wire):
    """The field `metadata`."""

    user_id: Label | None = None


class CountTokensBody(Wire):
    """The body of a request to /v1/messages/count_tokens."""

    unsupported: ClassVar[Neutral] = CONVERSATION
    hints: ClassVar[bool] = False

    model: Label | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1), AtMost("max_messages")]
    system: Texts = None
    tools: Annotated[list[CustomTool], AtMost("max_tools")] | None = None
    tool_choice: ToolUseChoice | None = None
    output_config: OutputConfig | None = None


class MessagesBody(CountTokensBody):
    """The body of a request to /v1/messages."""

    unsupported: ClassVar[Neutral] = MESSAGES

    max_tokens: int = Field(ge=1)
    stop_sequences: StopStrings | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    metadata: RequestMetadata | None = None
    stream: bool | None = None
