"""What clients can ask an answer to follow, in llguidance's form: JSON schemas, expressions, choices, grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from bdh_batch.errors import InvalidRequest
from bdh_batch.text.grammar import Source

# JSON is written on one line: a small model that may begin a new line at every comma seldom does anything else.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
FUEL = 5000  # schemas that are looked at
ANY_OBJECT = {"type": "object"}


def from_schema(schema: Mapping[str, Any], param: str) -> Source:
    """Raises InvalidRequest where it cannot be written down, or is seen at once to have no end."""
    return Source(LLMatcher.grammar_from_json_schema(_written(schema, param)), param)


def from_regex(regex: str, param: str) -> Source:
    return Source(LLMatcher.grammar_from_regex(regex), param)


def from_choice(choices: Sequence[str], param: str) -> Source:
    # One terminal: a parser that weighed each of them would take a thousand at most.
    return Source("start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices), param)


def from_lark(grammar: str, param: str) -> Source:
    return Source(grammar, param)


def json_rule(schema: Mapping[str, Any], param: str) -> str:
    """JSON of `schema`, as a term of a rule."""
    return f"%json {_written(schema, param)}"


def _written(schema: Mapping[str, Any], param: str) -> str:
    try:
        endless = not _Ends(schema).has_end(schema)
        uncounted = _counts_free_keys(schema)
        text = json.dumps({**schema, "x-guidance": LAYOUT})
    except RecursionError:
        raise InvalidRequest(f"{param}: It is nested too deeply.", param) from None
    if endless:
        raise InvalidRequest(f"{param}: Nothing satisfies it: what it requires contains itself without an end.", param)
    if uncounted:
        text = "minProperties goes with additionalProperties: false and no patternProperties, or with as many required"
        raise InvalidRequest(f"{param}: {text}: of other keys, one that came twice would count twice.", param)
    return text


def _counts_free_keys(schema: object) -> bool:
    """Whether a schema is anywhere in it that wants several keys, which may be any: a repeated one is no other."""
    if isinstance(schema, list):
        return any(map(_counts_free_keys, schema))
    if not isinstance(schema, Mapping):
        return False
    least, required = schema.get("minProperties"), set(map(str, _list(schema, "required")))
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    free = isinstance(least, int) and least > max(1, len(required)) and not closed
    return free or any(map(_counts_free_keys, schema.values()))


class _Ends:
    """Whether something finite may satisfy a schema: false only where it is seen to require itself, by references.

    A schema can lead to itself in more ways than anyone could follow; after some of them it is trusted.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._fuel = FUEL

    def has_end(self, schema: object, through: tuple[str, ...] = ()) -> bool:
        """`through` are the references that are being followed."""
        self._fuel -= 1
        if self._fuel <= 0 or not isinstance(schema, Mapping):
            return True
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference in through:
                return False
            if not self.has_end(_resolve(self._root, reference), (*through, reference)):
                return False
        if not all(self.has_end(each, through) for each in _needed(schema)):
            return False
        alternatives = (_list(schema, key) or [None] for key in ("anyOf", "oneOf"))
        return all(any(self.has_end(each, through) for each in group) for group in alternatives)


def _needed(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of which whatever satisfies `schema` has something in it."""
    needed = _list(schema, "allOf")
    if schema.get("type") == "object" and isinstance(properties := schema.get("properties"), Mapping):
        needed = needed + [properties.get(name) for name in _list(schema, "required") if isinstance(name, str)]
    if schema.get("type") == "array" and _count(schema):
        needed = needed + (_list(schema, "prefixItems")[: _count(schema)] or [schema.get("items")])
    return needed


def _count(schema: Mapping[str, Any]) -> int:
    value = schema.get("minItems")
    return value if isinstance(value, int) else 0


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _resolve(root: Mapping[str, Any], reference: str) -> object:
    """What `#/$defs/name` points to; None where it is nothing that is known here."""
    found: Any = root
    for key in filter(None, reference.removeprefix("#").split("/")) if reference.startswith("#") else ("",):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
