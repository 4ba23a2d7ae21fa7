"""A chat template as Hugging Face's are written: Jinja, with what those expect to find. Knows no tokenizer.

Model folders come from strangers, so it runs in Jinja's sandbox, and all but the built-in one in a process of its own
(`jail.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 32 * 2**20  # characters of a prompt that a template makes
LEADING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Question:
    """What a template is asked to render.

    `cut` is a text that is put at the end of the last message and does not occur anywhere else: there the prompt ends.
    Empty, it ends where the template ends it.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    add_generation_prompt: bool = True
    cut: str = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt; `ends` are the offsets at which messages end that other conversations are likely to begin with."""

    text: str
    ends: tuple[int, ...] = ()


class Refused(Exception):
    """The template cannot make a prompt of this."""


class Template:
    """
    Raises:
        TemplateError: it does not compile.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self._template = environment.from_string(source)

    def render(self, question: Question) -> Rendered:
        """
        Raises:
            Refused: whatever the template's code ended with.
        """
        messages = list(question.messages)
        if question.cut:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}{question.cut}"}
        text = self._render(messages, question.variables, question.add_generation_prompt)
        if question.cut:
            text, found, _ = text.rpartition(question.cut)
            if not found:
                raise Refused("it does not show the end of the last message, which should be continued")
        if len(text) > LONGEST:
            raise Refused(f"it makes more than {LONGEST} characters")
        return Rendered(text, tuple(self._ends(question, text)))

    def _ends(self, question: Question, text: str) -> Sequence[int]:
        """Where the leading instructions end, and what comes before the last user's message."""
        roles = [message["role"] for message in question.messages]
        leading = next((at for at, role in enumerate(roles) if role not in LEADING), len(roles))
        last_user = max((at for at, role in enumerate(roles) if role == "user"), default=0)
        ends = []
        for count in sorted({leading, last_user} - {0, len(roles)}):
            try:
                beginning = self._render(question.messages[:count], question.variables, False)
            except Refused:  # templates may insist on a user's message; then it is not known where others end
                continue
            if text.startswith(beginning):
                ends.append(len(beginning))
        return sorted(set(ends) - {0})

    def _render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        known = {"tools": None, "documents": None, **variables}
        try:
            return self._template.render(known, messages=messages, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise Refused(error.message) from error
        except MemoryError as error:
            raise Refused("it needs too much memory") from error
        except Exception as error:  # a template is a program, and can end with any error that Python has
            raise Refused(f"{type(error).__name__}: {error}") from error


class GenerationTag(Extension):
    """`{% generation %}` marks what a model should learn in training; here it stands for what is inside."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
