"""Tools as they come over the wire: what may be called, whether it has to be, and calls that were made before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.sizes import AtMost, BodyText, FreeObject, FunctionLabel, Label
from bdh_batch.http.request.strict import Read, Wire, shallow
from bdh_batch.text.calls import Tool, from_tools
from bdh_batch.text.sources import Source

MODES = {None: None, "none": "none", "auto": "auto", "required": "required", "any": "required"}  # of two APIs


class Function(Wire):
    """A function that the model may call."""

    name: FunctionLabel
    description: BodyText | None = None
    parameters: FreeObject | None = None
    strict: bool | None = None  # whether what cannot be kept to is refused, and not left out

    @field_validator("parameters", mode="before", json_schema_input_type=FreeObject | None)
    @classmethod
    def _are_shallow(cls, schema: object) -> object:
        return shallow(schema)

    @field_validator("parameters")
    @classmethod
    def _are_an_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None and schema.get("type", "object") != "object":
            raise PydanticCustomError("parameters", "Arguments are an object: the type should be 'object'")
        return schema


class FunctionTool(Wire):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class FunctionName(Wire):
    """The name of the function that has to be called."""

    name: Label


class NamedChoice(Wire):
    """A `tool_choice` that names one function."""

    type: Literal["function"]
    function: FunctionName


def _choice(value: object, named: Callable[[object], NamedChoice]) -> object:
    if isinstance(value, dict):
        return named(value)
    if not isinstance(value, str | None) or value not in MODES:
        raise PydanticCustomError("choice", "Input should be 'none', 'auto', 'required' or a function by its name")
    return MODES[value]


AnyChoice = Literal["none", "auto", "required", "any"] | NamedChoice
ToolChoice = Annotated[AnyChoice, Read(_choice, NamedChoice, AnyChoice)]


class Tools(Wire):
    """A body that can offer tools."""

    tools: Annotated[list[FunctionTool], AtMost("max_tools")] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tools")
    @classmethod
    def _have_names_of_their_own(cls, tools: list[FunctionTool] | None) -> list[FunctionTool] | None:
        names: set[str] = set()
        for index, tool in enumerate(tools or ()):
            if tool.function.name in names:
                raise PydanticCustomError("tools", "There are several functions of that name", {"index": index})
            names.add(tool.function.name)
        return tools

    @property
    def may_call(self) -> bool:
        """Whether responses may have calls in them."""
        return self.tool_choice != "none" and bool(self.tools or self.tool_choice not in (None, "auto"))

    @property
    def most_calls(self) -> int | None:
        """Most calls of a response; None is no bound. One that is named is called once."""
        return 1 if self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedChoice) else None

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    def calls(self, structured_output: Source | None, other: Source | None) -> Source:
        """The grammar of a response that may, or has to, call tools; one that calls none may have to follow the schema
        `structured_output`.

        Raises:
            InvalidRequest: the choice is not among the tools, or does not go with the `other` grammar.
        """
        if other is not None and (structured_output is None or self.tool_choice not in (None, "auto")):
            raise InvalidRequest(f"{other.param} cannot be used with tool calls.", other.param)
        tools = [
            Tool(each.name, each.parameters, f"tools[{index}].function.parameters", bool(each.strict))
            for index, each in enumerate(tool.function for tool in self.tools or ())
        ]
        if isinstance(self.tool_choice, NamedChoice):
            named = self.tool_choice.function.name
            tools = [tool for tool in tools if tool.name == named]
            if not tools:
                raise InvalidRequest(
                    f"tool_choice: The function {named!r} is not in tools.", "tool_choice.function.name"
                )
        if not tools:
            raise InvalidRequest("tool_choice can only be used with tools.", "tool_choice")
        return from_tools(tools, "tools", self.most_calls, self.tool_choice not in (None, "auto"), structured_output)
