"""Translates structured output to llguidance's Lark or JSON. Runs in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from json import JSONDecoder
from typing import Any

import orjson
from llguidance import LLMatcher

from bdh_batch.text.calls import CLOSE, OPEN, head
from bdh_batch.text.compiler import LIMITS
from bdh_batch.text.schema_rewriting import rewritten
from bdh_batch.text.schemas import NoGrammar, problem_of

# JSON is written on one line: a small model that may begin a new line at every comma seldom does anything else.
LAYOUT: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
OPTIONS = "x-guidance"  # the keyword of a schema that has the library's own options
# Where `%json` begins a schema: not in a string, an expression or a comment.
LITERAL_OR_JSON = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|%json\b')
GAP = r"/\n?/"
UNSATISFIABLE = "Unsatisfiable"  # how its errors begin where nothing satisfies a schema


@dataclass(slots=True)
class Written:
    """A grammar, and what was left out of its schemas: for each, the field of the request and an omission's fields."""

    grammar: str = ""
    warnings: list[dict[str, str]] = field(default_factory=list)

    def schema(
        self, schema: Mapping[str, Any], strict: bool, param: str, layout: Mapping[str, Any] | None = LAYOUT
    ) -> str:
        """`schema`, from the field `param`, in the library's JSON. Raises NoGrammar."""
        plain, omissions = rewritten(schema, strict, _compiles)
        problem = problem_of(plain)
        if problem is not None:
            raise NoGrammar(problem)
        self.warnings += [{"param": param, **asdict(omission)} for omission in omissions]
        return _json(plain if layout is None else {**plain, OPTIONS: layout})


def written(kind: str, value: Any, param: str) -> Written:
    """
    Raises:
        NoGrammar
    """
    made = Written()
    if kind == "schema":
        schema, strict = value
        made.grammar = LLMatcher.grammar_from_json_schema(made.schema(schema, strict, param))
    elif kind == "regex":
        made.grammar = LLMatcher.grammar_from_regex(value)
    elif kind == "choice":
        made.grammar = _choice(value)
    else:
        made.grammar = _calls(made, **value) if kind == "calls" else _lark(made, value, param)
    return made


def _compiles(schema: Mapping[str, Any]) -> bool:
    """Whether the library takes `schema`, be it that nothing satisfies it."""
    error = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(_json(schema)), limits=LIMITS)
    return not error or UNSATISFIABLE in error


def _choice(choices: Sequence[str]) -> str:
    # One terminal: a parser that weighed each of them would take a thousand at most.
    return "start: CHOICE\nCHOICE: " + " | ".join(map(_json, choices))


def _lark(made: Written, grammar: str, param: str) -> str:
    """A client's grammar, whose schemas (`%json {…}`) are rewritten as any other, but for their own layout."""
    parts, at = [], 0
    while (found := LITERAL_OR_JSON.search(grammar, at)) is not None:
        parts.append(grammar[at : found.end()])
        at = found.end()
        if found[0] == "%json" and (inline := _inline_schema(grammar, at)) is not None:
            schema, at = inline
            parts.append(f" {made.schema(schema, False, param, schema.get(OPTIONS))}")
    return "".join([*parts, grammar[at:]])


def _inline_schema(grammar: str, at: int) -> tuple[dict[str, Any], int] | None:
    """The object at `at`, and where it ends; None leaves what is none to the library, which says so."""
    while grammar[at : at + 1].isspace():
        at += 1
    try:
        _, end = JSONDecoder().raw_decode(grammar, at)
        schema = orjson.loads(grammar[at:end])
    except (ValueError, RecursionError):
        return None
    return (schema, end) if isinstance(schema, dict) else None


def _calls(
    made: Written,
    tools: Sequence[tuple[str, Mapping[str, Any], bool, str]],
    most: int | None,
    required: bool,
    otherwise: tuple[Mapping[str, Any], bool, str] | None,
) -> str:
    """Calls of `tools`: `most` of them at most, None is no bound. Where none is required, a response may be any text,
    or only JSON of the schema `otherwise`. Schemas come with whether they are strict, and with their fields."""
    rules = [
        f'tool{i}: {_json(head(name))} %json {made.schema(schema, strict, param)} "}}" {GAP} "{CLOSE}"'
        for i, (name, schema, strict, param) in enumerate(tools)
    ]
    rules.append(f"call: {GAP} ({' | '.join(f'tool{i}' for i in range(len(tools)))})")
    further = "*" if most is None else f"{{0,{most - 1}}}"
    rules.append("calls: call" + (f' ({GAP} "{OPEN}" call){further} {GAP}' if most != 1 else ""))
    start = "calls" if not required and otherwise is None else f'"{OPEN}" calls'
    if not required and otherwise is not None:
        start += f" | %json {made.schema(*otherwise)}"
    return "\n".join([f"start: {start}", *rules])


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
