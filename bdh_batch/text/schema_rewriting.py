"""Schemas as clients send them, rewritten to what the grammar library takes, in one pass without recursion.

- What asks for nothing is dropped: annotations, unknown keywords and formats, `uniqueItems: false`.
- What can be said otherwise is: references through any keyword, tuples of Draft 7, unions that exclude one another.
- Numbers are written so that they are kept exactly (`schema_numbers.py`).
- What cannot be kept to is left out and reported, or refused where the schema is strict.
- Objects that name properties, and do not say what else they may have, have nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from bdh_batch.system.documents import values_in
from bdh_batch.text.schema_node import OWN, UNSATISFIABLE, Node, Path, pointer, says_nothing
from bdh_batch.text.schema_numbers import LARGEST_STEP, BadNumber, check_constant, count
from bdh_batch.text.schema_objects import merged, of_objects
from bdh_batch.text.schema_unions import all_disjoint
from bdh_batch.text.schema_values import of_arrays, of_numbers, of_strings
from bdh_batch.text.schemas import NoGrammar

MOST_OMISSIONS = 32  # that are reported one by one
STRICT = "; without strict, it is left out"  # of an error, what helps a client


@dataclass(frozen=True, slots=True)
class Omission:
    """A keyword of a schema that responses may not keep to.

    Args:
        path: where in the schema it is, as a JSON pointer.
        keyword: empty where it stands for several more.
    """

    path: str
    keyword: str
    text: str


def rewritten(
    schema: Mapping[str, Any], strict: bool, compiles: Callable[[Mapping[str, Any]], bool]
) -> tuple[dict[str, Any], list[Omission]]:
    """`schema` as the library takes it, and what had to be left out of it.

    Args:
        compiles: whether the library takes a schema of strings, or of names.

    Raises:
        NoGrammar: it is no schema, nothing satisfies it, or it is `strict` and cannot be kept to.
    """
    rewriting = _Rewriting(schema, strict, compiles)
    return rewriting.run(), rewriting.omissions


class _Rewriting:
    """Implements `schema_node.Rewriter`. A schema that is referred to is rewritten once, or twice where some of what
    refers to it is intersected with other schemas."""

    def __init__(self, root: Mapping[str, Any], strict: bool, compiles: Callable[[Mapping[str, Any]], bool]) -> None:
        self._root = root
        self._strict = strict
        self._library_compiles = compiles
        self._compiles: dict[str, bool] = {}
        self._names: dict[tuple[int, bool], str] = {}  # of schemas that are referred to, by identity
        self._definitions: dict[str, Any] = {}
        self._ahead: list[tuple[Mapping[str, Any], dict[str, Any], Path, bool]] = []
        self._left_out = 0
        self._steps: set[int] = set()
        self.omissions: list[Omission] = []
        self._anchors = {name: each for each in _objects(root) for name in _anchors(each)}
        self._shared = {id(target) for target in self._targets() if isinstance(target, Mapping)}

    def run(self) -> dict[str, Any]:
        whole: dict[str, Any] = {}
        self._names[id(self._root), True] = "#"
        self._ahead.append((self._root, whole, None, True))
        while self._ahead:
            source, target, path, alone = self._ahead.pop()
            try:
                target.update(_written(Node(self, source, path, alone)))
            except BadNumber as error:
                raise NoGrammar(f"{pointer((path, error.keyword))}: {error.keyword}: {error}.") from error
        if self._left_out > MOST_OMISSIONS:
            self.omissions.append(Omission("#", "", f"{self._left_out - MOST_OMISSIONS} more keywords are left out."))
        return {**whole, "$defs": self._definitions} if self._definitions else whole

    def child(self, schema: object, path: Path, alone: bool) -> Any:
        if id(schema) in self._shared:
            return self.shared(schema, path, alone)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise NoGrammar(f"{pointer(path)}: A schema should be an object or a boolean.")
        target: dict[str, Any] = {}
        self._ahead.append((schema, target, path, alone))
        return target

    def shared(self, schema: object, path: Path, alone: bool) -> Any:
        if not isinstance(schema, Mapping):
            return self.child(schema, path, alone)
        name = self._names.get((id(schema), alone))
        if name is None:
            key = f"d{len(self._definitions)}"
            name = self._names[id(schema), alone] = f"#/$defs/{key}"
            self._definitions[key] = {}
            self._ahead.append((schema, self._definitions[key], path, alone))
        return {"$ref": name}

    def resolve(self, reference: str) -> object:
        base = self._root.get("$id")
        if isinstance(base, str) and reference.startswith(base.rstrip("#")):
            reference = reference[len(base.rstrip("#")) :]
        if reference in ("", "#"):
            return self._root
        if reference.startswith("#/"):
            return self._found(reference)
        if reference in self._anchors:
            return self._anchors[reference]
        raise NoGrammar(f"The reference {reference[:128]!r} cannot be resolved within the schema.")

    def leave_out(self, path: Path, keyword: str, text: str) -> None:
        if self._strict:
            raise NoGrammar(f"{pointer(path)}: {keyword} {text}{STRICT}.")
        self._left_out += 1
        if self._left_out <= MOST_OMISSIONS:
            self.omissions.append(Omission(pointer(path), keyword, f"{keyword} {text}."))

    def intersect_step(self, digits: int) -> None:
        # The library computes a least common multiple with 32 bits, of any of them, perhaps with itself.
        self._steps.add(digits)
        if math.prod(self._steps) * max(self._steps) > LARGEST_STEP:
            raise BadNumber("multipleOf", "cannot be kept exactly together with what else holds there")

    def compiles(self, schema: Mapping[str, Any]) -> bool:
        key = repr(schema)
        if key not in self._compiles:
            self._compiles[key] = self._library_compiles(schema)
        return self._compiles[key]

    def _found(self, reference: str) -> object:
        found: Any = self._root
        for part in reference[2:].split("/"):
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and int(key[:9]) < len(found):
                found = found[int(key[:9])]
            else:
                raise NoGrammar(f"The reference {reference[:128]!r} cannot be resolved.")
        return found

    def _targets(self) -> Iterator[object]:
        """What is referred to. A string may look like a reference without being one."""
        for each in _objects(self._root):
            for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
                if isinstance(reference := each.get(keyword), str):
                    try:
                        yield self.resolve(reference)
                    except NoGrammar:
                        continue


def _objects(root: object) -> Iterator[Mapping[str, Any]]:
    return (each for each in values_in(root) if isinstance(each, Mapping))


def _anchors(schema: Mapping[str, Any]) -> Iterator[str]:
    for keyword, prefix in (("$anchor", "#"), ("$dynamicAnchor", "#"), ("$id", "")):
        if isinstance(name := schema.get(keyword), str):
            yield prefix + name


def _written(node: Node) -> Mapping[str, Any]:
    said = {keyword: value for keyword, value in node.schema.items() if value is not None or keyword == "const"}
    node = Node(node.rewriter, _with_references(said), node.path, node.alone)
    if (whole := merged(node)) is not None:
        return _written(Node(node.rewriter, whole, node.path, node.alone))
    if "not" in node.schema and says_nothing(node.schema["not"]):
        return UNSATISFIABLE
    found: dict[str, Any] = {} if node.types is None else {"type": node.schema["type"]}
    found |= _constants(node)
    if node.allows("string"):
        found |= of_strings(node, count(node.schema, "minLength"), count(node.schema, "maxLength"))
    if node.allows("number", "integer"):
        found |= of_numbers(node)
    if node.allows("array"):
        found |= of_arrays(node, count(node.schema, "minItems"), count(node.schema, "maxItems"))
    if node.allows("object"):
        found |= of_objects(node, count(node.schema, "minProperties"), count(node.schema, "maxProperties"))
    _leave_out_conditions(node)
    return found | _in_place(node)


def _with_references(schema: dict[str, Any]) -> dict[str, Any]:
    """The references of newer drafts to the whole schema are plain ones, as nothing extends it here."""
    for keyword in ("$dynamicRef", "$recursiveRef"):
        if schema.get(keyword) == "#" and "$ref" not in schema:
            schema["$ref"] = schema.pop(keyword)
    return schema


def _constants(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "const" in node.schema:
        check_constant("const", node.schema["const"])
        found["const"] = node.schema["const"]
    if "enum" in node.schema:
        found["enum"] = node.items("enum")
        check_constant("enum", found["enum"])
    return found


def _leave_out_conditions(node: Node) -> None:
    if "not" in node.schema and node.schema["not"] is not False:
        node.leave_out("not")
    branches = [node.schema[keyword] for keyword in ("then", "else") if keyword in node.schema]
    if "if" in node.schema and not all(map(says_nothing, branches)):
        node.leave_out("if")
    for keyword in ("$dynamicRef", "$recursiveRef"):
        if keyword in node.schema:
            node.leave_out(keyword)


def _in_place(node: Node) -> dict[str, Any]:
    """The schemas that hold for the same value. They are alone where there is one, and nothing beside it."""
    groups = [node.schema[keyword] for keyword in ("anyOf", "oneOf", "$ref") if node.schema.get(keyword)]
    alone = node.alone and len(groups) + len(node.items("allOf")) == 1 and not node.schema.keys() & OWN
    found: dict[str, Any] = {}
    for keyword in ("allOf", "anyOf", "oneOf"):
        if members := node.items(keyword):
            found[keyword] = [node.child(each, alone, keyword, str(i)) for i, each in enumerate(members)]
        elif keyword in node.schema and keyword != "allOf":
            return dict(UNSATISFIABLE)
    if "oneOf" in found:
        found = _exclusive(node, found)
    if "$ref" in node.schema:
        reference = node.schema["$ref"]
        if not isinstance(reference, str):
            raise node.refusal("$ref", "should be a string")
        referred = _referred(node, reference, alone)
        if isinstance(referred, bool):
            found["allOf"] = [*found.get("allOf", ()), referred]
        else:
            found |= referred
    return found


def _referred(node: Node, reference: str, alone: bool) -> Any:
    try:
        target = node.rewriter.resolve(reference)
    except NoGrammar as error:
        if reference.startswith("#"):
            raise node.refusal("$ref", str(error).rstrip(".")) from error
        node.leave_out("$ref", "leads out of the schema")
        return True
    path: Path = None if reference.startswith("#") else (node.path, "$ref")
    for part in reference[2:].split("/") if reference.startswith("#/") else ():
        path = (path, part)
    return node.rewriter.shared(target, path, alone)


def _exclusive(node: Node, found: dict[str, Any]) -> dict[str, Any]:
    """`oneOf` as `anyOf`: the same where its members exclude one another."""
    members = found.pop("oneOf")
    if not all_disjoint(node.items("oneOf"), node.rewriter.resolve):
        node.leave_out("oneOf", "is taken as anyOf: several of its schemas may hold")
    if "anyOf" in found:
        return {**found, "allOf": [*found.get("allOf", ()), {"anyOf": members}]}
    return {**found, "anyOf": members}
