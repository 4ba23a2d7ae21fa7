"""Checks a JSON schema before it is compiled: whether anything satisfies it.

All of it without recursion, and in steps that grow as the schema does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DEEPEST = 400  # references and subschemas that lead into one another


class NoGrammar(Exception):
    """What a client asked for cannot be written as a grammar: a 400 that says why."""


def problem_of(schema: Mapping[str, Any]) -> str | None:
    """Why `schema` cannot be kept to, or None where nothing is seen that speaks against it."""
    needs = _Needs(schema)
    if needs.too_deep:
        return f"Its references and subschemas lead more than {DEEPEST} deep into one another."
    if not needs.can_end():
        return "Nothing satisfies it: what it requires contains itself without an end."
    return None


class _Needs:
    """The schemas that lead out of a schema, each with groups of others: of each group, one has to be satisfied.

    A schema can end where, of each of its groups, one can; so those that require themselves, by references, cannot.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._groups: dict[int, list[list[int]]] = {}  # by the identity of a schema
        self.too_deep = False
        self._find()

    def can_end(self) -> bool:
        """Of the root: the least set of schemas that can, found from those that need nothing. A group is counted once,
        when the first of its members can end."""
        users: dict[int, list[tuple[int, int]]] = {}  # by a schema, whose group it is in, and which
        for schema, groups in self._groups.items():
            for number, group in enumerate(groups):
                for member in group:
                    users.setdefault(member, []).append((schema, number))
        unsatisfied = {schema: set(range(len(groups))) for schema, groups in self._groups.items()}
        ahead = [schema for schema, numbers in unsatisfied.items() if not numbers]
        while ahead:
            for schema, number in users.pop(ahead.pop(), ()):
                left = unsatisfied[schema]
                if number in left:
                    left.remove(number)
                    if not left:
                        ahead.append(schema)
        return not unsatisfied[id(self._root)]

    def _find(self) -> None:
        path: list[Iterator[object]] = [iter([self._root])]
        while path:
            schema = next(path[-1], path)
            if schema is path:
                path.pop()
            elif id(schema) not in self._groups:
                groups = list(self._groups_of(schema))
                self._groups[id(schema)] = [list(map(id, group)) for group in groups]
                path.append(iter([each for group in groups for each in group]))
                if len(path) > DEEPEST:
                    self.too_deep = True
                    return

    def _groups_of(self, schema: object) -> Iterator[Sequence[object]]:
        if not isinstance(schema, Mapping):
            return
        if isinstance(reference := schema.get("$ref"), str):
            yield [_resolve(self._root, reference)]
        for needed in _needed(schema):
            yield [needed]
        for key in ("anyOf", "oneOf"):
            if alternatives := _list(schema, key):
                yield alternatives


def _needed(schema: Mapping[str, Any]) -> list[Any]:
    """The schemas of which whatever satisfies `schema` has something in it."""
    needed = list(_list(schema, "allOf"))
    if schema.get("type") == "object" and isinstance(properties := schema.get("properties"), Mapping):
        needed += [properties.get(name) for name in _list(schema, "required") if isinstance(name, str)]
    if schema.get("type") == "array" and (count := _count(schema)):
        needed += _list(schema, "prefixItems")[:count] or [schema.get("items")]
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
