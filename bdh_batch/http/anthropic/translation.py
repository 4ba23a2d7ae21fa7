"""Makes a chat body of a Messages body, and gives errors about it the names of the client's fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import orjson

from bdh_batch.errors import BDHError, InvalidRequest
from bdh_batch.http.anthropic.bodies import ContentBlock, CountTokensBody, InputMessage, MessagesBody, ResultBlock
from bdh_batch.http.schema.other_names import Names, Patterns
from bdh_batch.text.schema_rewriting import STRICT

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
SAME = ("max_tokens", "temperature", "top_p", "top_k", "stream")
SCHEMA = "output_config.format.schema"  # which is strict in any case
ERROR = "Error: "  # what the result of a tool that failed begins with
# Of the fields of a chat body: what they come from.
NAMES: Patterns = (
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"^(tools\[\d+\])\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
    (re.compile(r"^tool_choice\.function"), "tool_choice"),
    (re.compile(r"^parallel_tool_calls\b"), "tool_choice.disable_parallel_tool_use"),
    (re.compile(r"^response_format\.json_schema\.schema"), SCHEMA),
    (re.compile(r"^response_format\b"), "output_config.format"),
    (re.compile(r"^continue_final_message\b"), "messages"),
)
Part = tuple[str, dict[str, Any]]  # a field of the client's, and the chat message that is made of it


class MessageNames(Names):
    """The names of fields in the Messages API, where schemas are strict in any case."""

    def of(self, error: BDHError) -> BDHError:
        renamed = super().of(error)
        if isinstance(renamed, InvalidRequest) and renamed.param == SCHEMA:
            return type(renamed)(renamed.message.replace(STRICT, ""), SCHEMA, renamed.code)
        return renamed


def chat_fields(body: CountTokensBody) -> tuple[dict[str, Any], Names]:
    """The fields of the chat body, and what the client calls them.

    Raises:
        InvalidRequest: the conversation ends with the use of a tool.
    """
    parts = [*_parts(body)]
    values: dict[str, Any] = {"model": body.model, "messages": [message for _, message in parts]}
    if body.messages[-1].role == "assistant":
        _check_goes_on(len(body.messages) - 1, body.messages[-1])
        values["continue_final_message"] = True
    if body.tools is not None:
        values["tools"] = [
            {
                "type": "function",
                "function": _said(
                    name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
                ),
            }
            for tool in body.tools
        ]
    if body.tool_choice is not None:
        named = {"type": "function", "function": {"name": body.tool_choice.name}}
        values["tool_choice"] = CHOICES.get(body.tool_choice.type, named)
        if body.tool_choice.disable_parallel_tool_use:
            values["parallel_tool_calls"] = False
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"schema": body.output_config.format.schema_, "strict": True}
        values["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesBody):
        values |= {name: getattr(body, name) for name in SAME}
        values["stop"] = body.stop_sequences
        values["user"] = None if body.metadata is None else body.metadata.user_id
    return _said(**values), MessageNames([origin for origin, _ in parts], NAMES)


def _said(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_goes_on(index: int, last: InputMessage) -> None:
    for at, block in enumerate(last.blocks):
        if block.type == "tool_use":
            param = f"messages[{index}].content[{at}]"
            raise InvalidRequest(f"{param}: The message after a tool_use should have its tool_result.", param)


def _parts(body: CountTokensBody) -> Iterator[Part]:
    if body.system:
        yield "system", {"role": "system", "content": body.system}
    for index, message in enumerate(body.messages):
        param = f"messages[{index}].content"
        if isinstance(message.content, str):
            yield param, {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            yield param, _of_assistant(message.content)
        else:
            yield from _of_user(param, message.content)


def _of_assistant(blocks: Sequence[ContentBlock]) -> dict[str, Any]:
    text = _text(blocks)
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": _json(block.input)}}
        for block in blocks
        if block.type == "tool_use"
    ]
    return {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})


def _of_user(param: str, blocks: Sequence[ContentBlock]) -> Iterator[Part]:
    """Results of tools are messages of their own; what is between them is one."""
    if not blocks:
        yield param, {"role": "user", "content": ""}
    for results, some in groupby(enumerate(blocks), lambda each: each[1].type == "tool_result"):
        run = [*some]
        if not results:
            yield param, {"role": "user", "content": _text_or_parts([block for _, block in run])}
        else:
            for at, block in run:
                message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
                yield f"{param}[{at}]", message


def _result(block: ContentBlock) -> str | list[dict[str, Any]]:
    error, said = ERROR if block.is_error else "", block.content or ""
    if isinstance(said, str):
        return error + said
    return [*([_text_part(error)] if error else []), *map(_part, said)]


def _text_or_parts(blocks: Sequence[ContentBlock]) -> str | list[dict[str, Any]]:
    return _text(blocks) if all(block.source is None for block in blocks) else [*map(_part, blocks)]


def _part(block: ContentBlock | ResultBlock) -> dict[str, Any]:
    if block.source is None:
        return _text_part(block.text or "")
    return {"type": "image_url", "image_url": {"url": block.source.location}}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _text(blocks: Sequence[ContentBlock]) -> str:
    return "".join(block.text or "" for block in blocks if block.type == "text")
