"""A chat template as Hugging Face's are written: Jinja, with what those expect to find. Knows no tokenizer.

Model folders come from strangers, so it runs in Jinja's sandbox, and in a process of its own (`sandbox.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import orjson
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bdh_batch.text.sandbox_process import Prepared, Refused
from bdh_batch.text.stand_ins import CUT, SPELL, Literals, StandIns, TooMany

LONGEST = 32 * 2**20  # characters of a prompt that a template makes
LEADING = ("system", "developer")
BEYOND_ASCII = re.compile("[^\x00-\x7f\udc80-\udcbf]")
PROBES = (("user", "assistant", "user"), ("system", "user"))


@dataclass(frozen=True, slots=True)
class Question:
    """A job for a template: the messages to render. With `continue_final` the prompt ends with the last message."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    add_generation_prompt: bool = True
    continue_final: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt, in which characters stand for special tokens; `ends` are the offsets at which messages end that other
    conversations are likely to begin with."""

    text: str
    ends: tuple[int, ...] = ()


class Template:
    """A compiled chat template.

    Args:
        special: texts of special tokens, the longest first, that only the template can write.
        names: of special tokens, such as `bos_token`, for the template.

    Raises:
        TemplateError: it does not compile.
        TooMany
    """

    def __init__(self, source: str, special: Sequence[str] = (), names: Mapping[str, str] | None = None) -> None:
        self._stand_ins = StandIns(special)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.filters[SPELL] = self._stand_ins.put_together
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        tree = Literals(self._stand_ins).visit(environment.parse(source))
        self._template = environment.from_string(tree)
        self._names = {name: self._stand_ins.put(text) for name, text in (names or {}).items()}
        self._stand_ins.complete()

    @property
    def tokens(self) -> dict[str, str]:
        """The special tokens that its prompts can have, by the characters that stand for them."""
        return self._stand_ins.tokens

    def unsure(self) -> list[str]:
        """Special tokens that it puts together in a way that cannot be distinguished from what a client writes."""
        found: set[str] = set()
        for roles in PROBES:
            try:
                text = self._render([{"role": role, "content": "x"} for role in roles], {}, True)
            except Refused:  # templates may insist on some order of roles
                continue
            found.update(self._stand_ins.spelt(text))
        return sorted(found)

    def render(self, question: Question) -> Rendered:
        """
        Raises:
            Refused: whatever the template's code ended with.
        """
        messages = list(question.messages)
        if question.continue_final:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}{CUT}"}
        text = self._render(messages, question.variables, question.add_generation_prompt)
        if question.continue_final:
            text, found, _ = text.rpartition(CUT)
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
                prefix = self._render(question.messages[:count], question.variables, False)
            except Refused:  # templates may insist on a user's message; then it is not known where others end
                continue
            if text.startswith(prefix):
                ends.append(len(prefix))
        return sorted(set(ends) - {0})

    def _render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        known = {"tools": None, "documents": None, **self._names, **variables}
        try:
            return self._template.render(known, messages=messages, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise Refused(error.message) from error
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, and can end with any error that Python has
            raise Refused(f"{type(error).__name__}: {error}") from error


class GenerationTag(Extension):
    """The Jinja tag `generation`, without effect.

    `{% generation %}` marks what a model should learn in training; here it stands for what is inside.
    """

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def prepare(setup: bytes) -> Prepared:
    """What a sandbox needs to render the template of `setup`."""
    try:
        template = Template(**orjson.loads(setup))
        unsure = template.unsure()
    except (TemplateError, TooMany) as error:
        raise Refused(str(error)) from error

    def work(job: bytes) -> bytes:
        rendered = template.render(Question(**orjson.loads(job)))
        return encoded(rendered)

    tokens = {f"{ord(character):x}": token for character, token in template.tokens.items()}
    return Prepared(work, orjson.dumps({"tokens": tokens, "unsure": unsure}))


def encoded(rendered: Rendered) -> bytes:
    ends = b",".join(b"%d" % end for end in rendered.ends)
    return ends + b"\n" + rendered.text.encode(errors="surrogateescape")


def decoded(said: bytes) -> Rendered:
    """What `encoded` was made of."""
    ends, _, text = said.partition(b"\n")
    return Rendered(text.decode(errors="surrogateescape"), tuple(map(int, ends.split(b","))) if ends else ())


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # What stands for a special token is no part of what is escaped.
    return BEYOND_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
