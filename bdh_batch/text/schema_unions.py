"""Finds whether the schemas of a union exclude one another, as far as it is seen at once: by type, by value, or by a
property that distinguishes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import orjson

from bdh_batch.text.schemas import NoGrammar

MOST = 128  # schemas of a union; each is compared with each
NESTED = 16  # of one inside of it
DEEPEST = 3  # references and unions that lead into one another
KINDS = frozenset({"null", "boolean", "number", "string", "array", "object"})

Resolve = Callable[[str], object]


def all_disjoint(schemas: Sequence[object], resolve: Resolve) -> bool:
    """Whether no value satisfies two of `schemas`, for certain."""
    if len(schemas) > MOST:
        return False
    summaries = [_Summary(schema, resolve) for schema in schemas]
    return all(a.excludes(b) for a, b in combinations(summaries, 2))


class _Summary:
    """What is known of all values of a schema."""

    def __init__(self, schema: object, resolve: Resolve, properties: bool = True) -> None:
        schema = _followed(schema, resolve)
        self.kinds = _kinds(schema, resolve, DEEPEST)
        self.values = _values(schema)
        self.required: set[str] = set()
        self.properties: dict[str, _Summary] = {}
        if properties and isinstance(schema, Mapping):
            required, named = schema.get("required"), schema.get("properties")
            self.required = (
                {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
            )
            if isinstance(named, Mapping):
                objects = {name: each for name, each in named.items() if isinstance(each, Mapping)}
                self.properties = {name: _Summary(each, resolve, False) for name, each in objects.items()}

    def excludes(self, other: _Summary) -> bool:
        kinds = self.kinds & other.kinds
        if not kinds or (self.values is not None and other.values is not None and not self.values & other.values):
            return True
        names = (self.required | other.required) & self.properties.keys() & other.properties.keys()
        return kinds == {"object"} and any(self.properties[name].excludes(other.properties[name]) for name in names)


def _followed(schema: object, resolve: Resolve) -> object:
    for _ in range(DEEPEST):
        if not isinstance(schema, Mapping) or not isinstance(reference := schema.get("$ref"), str):
            break
        try:
            schema = resolve(reference)
        except NoGrammar:
            break
    return schema


def _kinds(schema: object, resolve: Resolve, depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or not depth:
        return KINDS if schema is not False else frozenset()
    said = schema.get("type")
    types = [said] if isinstance(said, str) else said
    if isinstance(types, list):
        return frozenset("number" if each == "integer" else str(each) for each in types)
    if (values := _values(schema)) is not None:
        return frozenset(kind for kind, _ in values)
    for keyword in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(keyword), list) and len(members) <= NESTED:
            return frozenset().union(*(_kinds(_followed(each, resolve), resolve, depth - 1) for each in members))
    return KINDS


def _values(schema: object) -> frozenset[tuple[str, Any]] | None:
    """All that a schema allows, where it lists that."""
    if not isinstance(schema, Mapping) or not schema.keys() & {"const", "enum"}:
        return None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    return frozenset(map(_value, values)) if isinstance(values, list) else None


def _value(value: object) -> tuple[str, Any]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number", value  # 1 and 1.0 are one value
    for kind, name in ((bool, "boolean"), (str, "string"), (list, "array"), (Mapping, "object")):
        if isinstance(value, kind):
            return name, orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return "null", None
