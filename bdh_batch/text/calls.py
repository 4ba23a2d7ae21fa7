"""Calls of tools as text: how a model is to write them, and how they are read back while they come.

A call is `<tool_call>{"name": …, "arguments": …}</tool_call>`, as in the templates of many models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_batch.text.sources import ANY_OBJECT, Source, from_schema
from bdh_batch.text.tokenizer import CALL

OPEN, CLOSE = CALL
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
OTHERWISE_PARAM = "response_format.json_schema.schema"


@dataclass(frozen=True)
class Tool:
    """A function that may be called. `parameters` is the schema of its arguments, None where it has none."""

    name: str
    parameters: Mapping[str, Any] | None
    param: str  # the field that the schema comes from

    @property
    def schema(self) -> Mapping[str, Any]:
        return NO_ARGUMENTS if self.parameters is None else {**ANY_OBJECT, **self.parameters}


def head(name: str) -> str:
    """What a call of `name` begins with, after OPEN."""
    return f'{{"name": "{name}", "arguments": '


def from_tools(
    tools: Sequence[Tool], param: str, parallel: bool, required: bool, otherwise: Mapping[str, Any] | None = None
) -> Source:
    """Calls of `tools`; one, or several where they may be `parallel`. Where none is required, an answer may be any
    text, or only JSON of the schema `otherwise`."""
    parts = [from_schema(tool.schema, tool.param) for tool in tools]
    if otherwise is not None:
        parts.append(from_schema(otherwise, OTHERWISE_PARAM))
    offered = [(tool.name, tool.schema) for tool in tools]
    value = {"tools": offered, "parallel": parallel, "required": required, "otherwise": otherwise}
    return Source("calls", value, param, parts, OPEN if not required and otherwise is None else "")


@dataclass(frozen=True, slots=True)
class Said:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins: the `index`th of an answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """A piece of the arguments of the call `index`, which are JSON."""

    index: int
    text: str


Piece = Said | Called | Argued


class CallReader:
    """Takes an answer's text as it comes, gives what is in it. Text that turns out to be no call is given as it is."""

    def __init__(self, names: Sequence[str]) -> None:
        self._heads = {head(name): name for name in names}
        self._read = self._read_text
        self._held = ""
        self._began = 0
        self.calls = 0  # that are complete
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def inside(self) -> bool:
        """Whether a call is not complete yet."""
        return self._began > self.calls

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            before, reader = self._held, self._read
            pieces += self._read()
            if self._held == before and self._read == reader:
                return pieces

    def flush(self) -> list[Piece]:
        """What is left when no more text comes; a call that has hardly begun is none."""
        held, self._held = self._held, ""
        return [Said(held)] if held and self._read == self._read_text and not self.calls else []

    def _read_text(self) -> list[Piece]:
        if self.calls:  # between calls there is nothing but space
            self._held = self._held.lstrip()
        text, opened, rest = self._held.partition(OPEN)
        if opened:
            self._held, self._read = rest, self._read_head
        else:
            keep = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return [Said(text)] if text else []

    def _read_head(self) -> list[Piece]:
        written = self._held.lstrip("\n")
        for beginning, name in self._heads.items():
            if written.startswith(beginning):
                self._held, self._read = written[len(beginning) :], self._read_arguments
                self._began += 1
                self._depth, self._quoted, self._escaped = 0, False, False
                return [Called(self._began - 1, name)]
        if any(beginning.startswith(written) for beginning in self._heads):
            return []
        self._read = self._read_text
        text, self._held = OPEN + self._held[:1], self._held[1:]
        return [Said(text)]

    def _read_arguments(self) -> list[Piece]:
        """Up to the bracket that closes the first."""
        for at, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return self._argued(at + 1, self._read_end)
        return self._argued(len(self._held), self._read_arguments) if self._held else []

    def _read_end(self) -> list[Piece]:
        _, closed, rest = self._held.partition(CLOSE)
        if closed:
            self.calls += 1
            self._held, self._read = rest, self._read_text
        return []

    def _argued(self, end: int, then: Any) -> list[Piece]:
        text, self._held, self._read = self._held[:end], self._held[end:], then
        return [Argued(self._began - 1, text)]
