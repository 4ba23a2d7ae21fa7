"""What a client asked for, written in llguidance's form: its Lark, or its JSON. Runs in the sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from llguidance import LLMatcher

from bdh_batch.text.calls import CLOSE, OPEN, head
from bdh_batch.text.schemas import problem_of

# JSON is written on one line: a small model that may begin a new line at every comma seldom does anything else.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
GAP = r"/\n?/"


class NoGrammar(Exception):
    """It cannot be written down; says why."""


def written(kind: str, value: Any) -> str:
    """
    Raises:
        NoGrammar
    """
    if kind == "schema":
        return LLMatcher.grammar_from_json_schema(_schema(value))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        return _choice(value)
    return _calls(**value) if kind == "calls" else str(value)


def _schema(schema: Mapping[str, Any]) -> str:
    problem = problem_of(schema)
    if problem is not None:
        raise NoGrammar(problem)
    return _json({**schema, "x-guidance": LAYOUT})


def _choice(choices: Sequence[str]) -> str:
    # One terminal: a parser that weighed each of them would take a thousand at most.
    return "start: CHOICE\nCHOICE: " + " | ".join(map(_json, choices))


def _calls(
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    parallel: bool,
    required: bool,
    otherwise: Mapping[str, Any] | None,
) -> str:
    """Calls of `tools`; one, or several where they may be `parallel`. Where none is required, an answer may be any
    text, or only JSON of the schema `otherwise`."""
    rules = [
        f'tool{i}: {_json(head(name))} %json {_schema(schema)} "}}" {GAP} "{CLOSE}"'
        for i, (name, schema) in enumerate(tools)
    ]
    rules.append(f"call: {GAP} ({' | '.join(f'tool{i}' for i in range(len(tools)))})")
    rules.append("calls: call" + (f' ({GAP} "{OPEN}" call)* {GAP}' if parallel else ""))
    start = "calls" if not required and otherwise is None else f'"{OPEN}" calls'
    if not required and otherwise is not None:
        start += f" | %json {_schema(otherwise)}"
    return "\n".join([f"start: {start}", *rules])


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
