"""Chat messages to a prompt, by a template: the model folder's, or plain `role: content` lines.

What clients write does not become special tokens, unless the settings say so: before the template sees it, a mark is
put in front of whatever spells one, and the tokenizer takes what the mark precedes for text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Text
from bdh_batch.text.template import Question, Refused, Rendered, Template

DEFAULT_TEMPLATE = """\
{%- if tools %}system: You may call these functions: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}{% for call in message.tool_calls %}\
<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}</tool_call>\
{% endfor %}

{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode's private use: characters that mean nothing to anyone
RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    Args:
        add_generation_prompt: the assistant's answer follows.
        continue_final: the answer goes on with the last message.
        variables: for the template, such as `tools`.
        add_special: whether the tokenizer adds what it puts around a text; None leaves it to the template.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    continue_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_special: bool | None = None


class Renderer(Protocol):
    async def render(self, question: Question) -> Rendered: ...

    def close(self) -> None: ...


class BuiltIn:
    """The default template, which needs no jail."""

    def __init__(self) -> None:
        self._template = Template(DEFAULT_TEMPLATE)

    async def render(self, question: Question) -> Rendered:
        return self._template.render(question)

    def close(self) -> None:
        pass


class ChatTemplate:
    """
    Args:
        renderer: None is the built-in one.
        special: texts that clients cannot write as special tokens, the longest first.
        names: of special tokens, such as `bos_token`, for the template.
    """

    def __init__(
        self, renderer: Renderer | None = None, special: Sequence[str] = (), names: Mapping[str, str] | None = None
    ) -> None:
        self._renderer = renderer or BuiltIn()
        self._add_special = renderer is None  # templates write out what belongs around a conversation; that one cannot
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self._names = names or {}

    async def render(self, conversation: Conversation) -> Text:
        """The prompt.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        texts = "".join(_texts([conversation.messages, conversation.variables]))
        cut, mark = (chr(code) for code, _ in zip((c for c in PRIVATE if chr(c) not in texts), range(2)))
        guard = _inserter(self._special, mark) if self._special and self._special.search(texts) else None
        question = Question(
            messages=[_guarded(message, guard) for message in conversation.messages],
            variables={**self._names, **_guarded(conversation.variables, guard)},
            add_generation_prompt=conversation.add_generation_prompt,
            cut=cut if conversation.continue_final else "",
        )
        try:
            rendered = await self._renderer.render(question)
        except Refused as error:
            raise InvalidRequest(f"messages: The chat template refuses these: {error}.", "messages") from error
        add_special = self._add_special if conversation.add_special is None else conversation.add_special
        return Text(rendered.text, add_special, mark if guard else "", rendered.ends)

    def close(self) -> None:
        self._renderer.close()


def _guarded(values: Mapping[str, Any], guard: Callable[[str], str] | None) -> Mapping[str, Any]:
    """What a client wrote; roles are not of its own choosing."""
    if guard is None:
        return values
    return {key: value if key == "role" else _map(value, guard) for key, value in values.items()}


def _inserter(special: re.Pattern[str], mark: str) -> Callable[[str], str]:
    return lambda text: special.sub(lambda match: mark + match[0], text)


def _texts(value: object) -> Iterator[str]:
    """All strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map(item, change) for item in value]
    return value
