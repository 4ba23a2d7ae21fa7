"""Makes a chat body of a body of the Responses API, and gives errors about it the names of the client's fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import PrivateAttr

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.responses_api.bodies import InputItem, InputTokensBody, ResponseBody, ToolSelection
from bdh_batch.http.schema.history import PastCall
from bdh_batch.http.schema.other_names import Names, Patterns
from bdh_batch.http.schema.requests import ChatBody, SamplingFields
from bdh_batch.text.chat import Conversation

# Of the fields of a chat body: what they come from.
NAMES: Patterns = (
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
    (re.compile(r"^tool_choice\.function"), "tool_choice"),
    (re.compile(r"^response_format\.json_schema"), "text.format"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^max_(completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"^messages\b"), "input"),
    (re.compile(r"^logprobs\b"), "include"),
    (re.compile(r"^reasoning_effort\b"), "reasoning.effort"),
)
Item = Mapping[str, Any]  # as responses list it
SAME = ("chat_template_kwargs", "prompt_cache_key", "safety_identifier", "stream", "user", *SamplingFields.names)


class TurnBody(ChatBody):
    """A chat body with what was said in the turns before, which has been checked already."""

    max_tool_calls: int | None = None

    _before: Sequence[Mapping[str, Any]] = PrivateAttr(default=())

    def goes_on_from(self, before: Sequence[Mapping[str, Any]]) -> None:
        """`before`: messages as a chat body has them. Instructions stay in front of them."""
        self._before = before

    @property
    def written(self) -> Mapping[str, Any]:
        fields = dict(super().written)
        fields["messages"] = self._whole(fields["messages"], self._before)
        return fields

    def conversation(self) -> Conversation:
        known = super().conversation()
        before = [_for_template(message) for message in self._before]
        return Conversation(
            self._whole(known.messages, before),
            known.add_generation_prompt,
            known.continue_final,
            known.variables,
            known.add_special,
        )

    @property
    def most_calls(self) -> int | None:
        return super().most_calls or self.max_tool_calls

    def _whole(self, new: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        instructed = int(bool(self._before) and self._instructed)
        return [*new[:instructed], *before, *new[instructed:]]

    _instructed: bool = PrivateAttr(default=False)

    def instructed(self) -> None:
        """Says that its first message are the instructions."""
        self._instructed = True


def _for_template(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [PastCall.model_validate(call).for_template() for call in message["tool_calls"]]
    return {**message, "content": message["content"] or "", "tool_calls": calls}


def chat_fields(body: InputTokensBody, items: Sequence[Item]) -> tuple[dict[str, Any], Names]:
    """The fields of the chat body, and what the client calls them.

    Args:
        items: of the input, as `input_items` made them.
    """
    parts = [*messages_of(items)]
    origins = [f"input[{index}]" if isinstance(body.input, list) else "input" for index, _ in parts]
    messages = [message for _, message in parts]
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
        origins.insert(0, "instructions")
    values: dict[str, Any] = {"model": body.model, "messages": messages, "state": body.state, **_tool_fields(body)}
    values["response_format"] = _format(body)
    values["reasoning_effort"] = None if body.reasoning is None else body.reasoning.effort
    if isinstance(body, ResponseBody):
        values |= {name: body.written[name] for name in SAME if name in body.written}
        values |= {"max_completion_tokens": body.max_output_tokens}
        if body.logprobs:
            values |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
        if body.stream_options is not None:
            values["stream_options"] = {"chunk_tokens": body.stream_options.chunk_tokens}
        values |= {"max_tool_calls": body.max_tool_calls}
        if body.max_tool_calls == 1:
            values["parallel_tool_calls"] = False
    return _said(**values), Names(origins, NAMES)


def _tool_fields(body: InputTokensBody) -> dict[str, Any]:
    offered, choice = body.tools or [], body.tool_choice
    if isinstance(choice, ToolSelection):
        if choice.type == "function":
            choice = {"type": "function", "function": {"name": choice.name}}
        else:
            # Those that may not be called are not shown to the model, either.
            allowed, known = {each.name for each in choice.tools or ()}, {tool.name for tool in offered}
            for index, each in enumerate(choice.tools or ()):
                if each.name not in known:
                    text = f"tool_choice.tools[{index}].name: {each.name[:128]!r} is none of the tools."
                    raise InvalidRequest(text, f"tool_choice.tools[{index}].name")
            offered, choice = [tool for tool in offered if tool.name in allowed], choice.mode or "auto"
    functions = [
        _said(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
        for tool in offered
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    return {"tools": tools or None, "tool_choice": choice, "parallel_tool_calls": body.parallel_tool_calls}


def _format(body: InputTokensBody) -> dict[str, Any] | None:
    if body.text is None or body.text.format is None:
        return None
    form = body.text.format
    if form.type != "json_schema":
        return {"type": form.type}
    schema = _said(name=form.name, description=form.description, schema=form.schema_, strict=form.strict)
    return {"type": "json_schema", "json_schema": schema}


def _said(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def input_items(body: InputTokensBody, id: str) -> list[dict[str, Any]]:
    """The items of the input, as responses list them; `id` is that of what they are the input of."""
    if isinstance(body.input, str):
        body_items = [InputItem(type="message", role="user", content=body.input)]
    else:
        body_items = body.input
    return [_listed(item, f"{id}_i{index}") for index, item in enumerate(body_items)]


def _listed(item: InputItem, id: str) -> dict[str, Any]:
    if item.type == "item_reference":
        return {"type": item.type, "id": item.id}
    beside = {"status": item.status or "completed"}
    if item.type == "message":
        kind = "output_text" if item.role == "assistant" else "input_text"
        part: dict[str, Any] = {"type": kind, "text": item.content}
        if kind == "output_text":
            part |= {"annotations": [], "logprobs": []}
        phase = {} if item.phase is None else {"phase": item.phase}
        own = item.id or f"msg_{id}"
        return {"type": "message", "id": own, **beside, "role": item.role, "content": [part], **phase}
    if item.type == "function_call":
        own = item.id or f"fc_{id}"
        called = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        return {"type": "function_call", "id": own, **beside, **called}
    own = item.id or f"fco_{id}"
    return {"type": "function_call_output", "id": own, **beside, "call_id": item.call_id, "output": item.output}


def messages_of(items: Iterable[Item]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The chat messages that items stand for, each with the index of its first one: calls are one message with the
    text that the assistant said before them."""
    calling: dict[str, Any] | None = None  # the assistant's message, to which calls that follow belong
    began = 0
    for index, item in enumerate(items):
        if item["type"] == "function_call":
            if calling is None:
                calling, began = {"role": "assistant", "content": None}, index
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            calling.setdefault("tool_calls", []).append(call)
            continue
        if calling is not None:
            yield began, calling
            calling = None
        if item["type"] == "function_call_output":
            yield index, {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            continue
        text = "".join(part.get("text") or part.get("refusal") or "" for part in item["content"])
        message = {"role": item["role"], "content": text}
        if item["role"] == "assistant":
            calling, began = message, index
        else:
            yield index, message
    if calling is not None:
        yield began, calling
