"""Calls of tools as text: how a model is to write them, and how they are read back while they come.

A call is `<tool_call>{"name": …, "arguments": …}</tool_call>`, as in the templates of many models.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_batch.text.sources import ANY_OBJECT, Source, from_schema
from bdh_batch.text.tokenizer import CALL

OPEN, CLOSE = CALL
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that may be called. `parameters` is the schema of its arguments, None where it has none."""

    name: str
    parameters: Mapping[str, Any] | None
    param: str  # the field that the schema comes from
    strict: bool = False  # what cannot be kept to is refused, and not left out

    @property
    def schema(self) -> Mapping[str, Any]:
        return NO_ARGUMENTS if self.parameters is None else {**ANY_OBJECT, **self.parameters}


def head(name: str) -> str:
    """What a call of `name` begins with, after OPEN."""
    return f'{{"name": "{name}", "arguments": '


def from_tools(
    tools: Sequence[Tool],
    param: str,
    most: int | None,
    required: bool,
    otherwise: Source | None = None,
) -> Source:
    """Calls of `tools`: `most` of them at most, None is no bound. Where none is required, a response may be any text,
    or only JSON of the schema `otherwise`."""
    parts = [from_schema(tool.schema, tool.param, tool.strict) for tool in tools]
    if otherwise is not None:
        parts.append(otherwise)
    offered = [(tool.name, tool.schema, tool.strict, tool.param) for tool in tools]
    other = None if otherwise is None else (*otherwise.value, otherwise.param)
    value = {"tools": offered, "most": most, "required": required, "otherwise": other}
    return Source("calls", value, param, parts, OPEN if not required and otherwise is None else "")


@dataclass(frozen=True, slots=True)
class Said:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins: the `index`th of a response."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """A piece of the arguments of the call `index`, which are JSON."""

    index: int
    text: str


Piece = Said | Called | Argued


class CallReader:
    """Takes a response's text as it comes, gives what is in it. Text that turns out to be no call is given as it is.

    What a text costs depends on its length alone: neither on how many tools there are, nor on what came before it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = {head(name): name for name in names}
        self._heads = sorted(self._names)  # none is a prefix of another one, as names have no quotes
        self._longest = max(map(len, self._heads), default=0)
        self._read = self._read_text
        self._text = ""  # what was received and is not all read yet
        self._at = 0  # where what is not read begins
        self._gap = 0  # newlines after OPEN
        self._began = 0
        self.calls = 0  # that are complete
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def inside(self) -> bool:
        """Whether a call is not complete yet."""
        return self._began > self.calls

    def push(self, text: str) -> list[Piece]:
        self._text, self._at = self._text[self._at :] + text, 0
        pieces: list[Piece] = []
        while self._read(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """What is left when no more text comes; a call that has hardly begun is none."""
        held, self._text, self._at = self._text[self._at :], "", 0
        return [Said(held)] if held and self._read == self._read_text and not self.calls else []

    # Each reads as far as it can, and says whether another one goes on from there; else more text has to come.

    def _read_text(self, pieces: list[Piece]) -> bool:
        while self.calls and self._text[self._at : self._at + 1].isspace():  # all there is between calls
            self._at += 1
        found = self._text.find(OPEN, self._at)
        if found >= 0:
            self._say(pieces, self._text[self._at : found])
            self._at, self._gap, self._read = found + len(OPEN), 0, self._read_head
            return True
        end = self._text[max(self._at, len(self._text) - len(OPEN) + 1) :]
        keep = next((n for n in range(len(end), 0, -1) if end.endswith(OPEN[:n])), 0)
        certain = len(self._text) - keep
        self._say(pieces, self._text[self._at : certain])
        self._at = certain
        return False

    def _read_head(self, pieces: list[Piece]) -> bool:
        while self._text.startswith("\n", self._at):
            self._at, self._gap = self._at + 1, self._gap + 1
        written = self._text[self._at : self._at + self._longest]
        after = bisect_right(self._heads, written)
        if after and written.startswith(begun := self._heads[after - 1]):
            self._at, self._read = self._at + len(begun), self._read_arguments
            pieces.append(Called(self._began, self._names[begun]))
            self._began += 1
            self._depth, self._quoted, self._escaped = 0, False, False
            return True
        if after < len(self._heads) and self._heads[after].startswith(written):
            return False
        said = "\n" * self._gap or written[:1]
        self._at, self._read = self._at + (0 if self._gap else len(said)), self._read_text
        self._say(pieces, OPEN + said)
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        """Up to the bracket that closes the first."""
        for at in range(self._at, len(self._text)):
            character = self._text[at]
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
                    self._argue(pieces, at + 1)
                    self._read = self._read_end
                    return True
        self._argue(pieces, len(self._text))
        return False

    def _read_end(self, pieces: list[Piece]) -> bool:
        found = self._text.find(CLOSE, self._at)
        if found < 0:
            self._at = max(self._at, len(self._text) - len(CLOSE) + 1)
            return False
        self.calls += 1
        self._at, self._read = found + len(CLOSE), self._read_text
        return True

    def _say(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(Said(text))

    def _argue(self, pieces: list[Piece], end: int) -> None:
        if end > self._at:
            pieces.append(Argued(self._began - 1, self._text[self._at : end]))
        self._at = end
