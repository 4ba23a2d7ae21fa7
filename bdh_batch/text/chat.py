"""Chat messages to a prompt, by a Jinja template: the model folder's, or plain `role: content` lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bdh_batch.errors import CheckpointError, InvalidRequest

DEFAULT_TEMPLATE = """\
{%- if tools %}system: You may call these functions: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}{% for call in message.tool_calls %}\
<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}</tool_call>\
{% endfor %}

{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


class ChatTemplate:
    """A compiled template; it runs in a sandbox, as model folders come from strangers."""

    def __init__(self, source: str = DEFAULT_TEMPLATE) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes for HTML
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt after which the assistant's answer follows; `tools` are what it may call.

        Raises:
            InvalidRequest: the template refuses these messages.
        """
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error.message}", "messages") from error


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def load_chat_template(folder: Path) -> ChatTemplate:
    """The template of a model folder, else the default.

    Raises:
        CheckpointError: the folder's template does not compile.
    """
    file = folder / "chat_template.jinja"
    if not file.is_file():
        return ChatTemplate()
    try:
        return ChatTemplate(file.read_text())
    except (TemplateSyntaxError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
