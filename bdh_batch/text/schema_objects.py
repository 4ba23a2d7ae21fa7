"""Objects of a schema, as the grammar library takes them, and closed where nothing says what else they may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bdh_batch.text.schema_node import ASSERTIONS, Node, says_nothing
from bdh_batch.text.schemas import NoGrammar

DECLARING = {
    *("patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "$recursiveRef"),
}


def of_objects(node: Node, least: int | None, most: int | None) -> dict[str, Any]:
    """What `node` says of objects, which have from `least` to `most` properties."""
    whole = node.alone and "$ref" not in node.schema and not any(_declares_more(node, each) for each in _in_place(node))
    named = node.mapping("properties")
    properties = {name: node.child(each, whole, "properties", name) for name, each in named.items()}
    found: dict[str, Any] = {
        "properties": properties,
        "required": list(dict.fromkeys(node.strings("required"))),
        "patternProperties": _patterns(node, whole),
    }
    said = _others(node, whole)
    if said is not None:
        found["additionalProperties"] = node.child(said[1], whole, said[0])
    elif whole and (found["patternProperties"] or "properties" in node.schema):
        found["additionalProperties"] = False
        for name in [*found["required"], *_required_in_place(node)]:
            properties.setdefault(name, True)
    _restrict_names(node, found, whole, ("additionalProperties", True) if said is None else said)
    found |= _counts(node, found, least or 0, most)
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        if node.mapping(keyword):
            node.leave_out(keyword)
    # Schemas are empty until they are filled in.
    return {key: value for key, value in found.items() if value not in ({}, []) or key == "additionalProperties"}


def _in_place(node: Node) -> Iterator[object]:
    for keyword in ("allOf", "anyOf", "oneOf"):
        yield from node.items(keyword)


def _declares_more(node: Node, schema: object) -> bool:
    """Whether `schema`, which holds for the same object, knows properties that `node` does not."""
    if not isinstance(schema, Mapping):
        return False
    names = schema.get("properties")
    more = isinstance(names, Mapping) and not names.keys() <= node.mapping("properties").keys()
    return more or bool(schema.keys() & DECLARING)


def _required_in_place(node: Node) -> Iterator[str]:
    for schema in _in_place(node):
        names = schema.get("required") if isinstance(schema, Mapping) else None
        yield from (name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _patterns(node: Node, whole: bool) -> dict[str, Any]:
    patterns = node.mapping("patternProperties")
    if patterns and not node.rewriter.compiles({"type": "object", "patternProperties": dict.fromkeys(patterns, True)}):
        node.leave_out(
            "patternProperties", "cannot be distinguished, or are expressions that the grammar library lacks"
        )
        return {}
    return {pattern: node.child(each, whole, "patternProperties", pattern) for pattern, each in patterns.items()}


def _others(node: Node, whole: bool) -> tuple[str, object] | None:
    """What `node` says of properties that are not named: its keyword and its schema."""
    if "additionalProperties" in node.schema:
        return "additionalProperties", node.schema["additionalProperties"]
    said = node.schema.get("unevaluatedProperties", True)
    if says_nothing(said) or whole:
        return ("unevaluatedProperties", said) if "unevaluatedProperties" in node.schema else None
    node.leave_out("unevaluatedProperties")
    return None


def _restrict_names(node: Node, found: dict[str, Any], whole: bool, others: tuple[str, object]) -> None:
    """Names of a known set are properties, and names that match an expression are those of a pattern; both as `others`
    are."""
    names = node.schema.get("propertyNames", True)
    if says_nothing(names, "string"):
        return
    known = _known_names(names)
    keyword, other = others
    if known is not None and not found["patternProperties"]:
        for name in known:
            if name not in found["properties"]:
                found["properties"][name] = node.rewriter.shared(other, (node.path, keyword), whole)
        for name in found["properties"].keys() - set(known):
            found["properties"][name] = False
        found["additionalProperties"] = False
    elif isinstance(pattern := _only_pattern(names), str) and not found["properties"] | found["patternProperties"]:
        if node.rewriter.compiles({"type": "object", "patternProperties": {pattern: True}}):
            found["patternProperties"] = {pattern: node.rewriter.shared(other, (node.path, keyword), whole)}
            found["additionalProperties"] = False
        else:
            node.leave_out("propertyNames")
    else:
        node.leave_out("propertyNames")


def _known_names(schema: object) -> list[str] | None:
    if not isinstance(schema, Mapping) or not schema.keys() & {"enum", "const"}:
        return None
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


def _only_pattern(schema: object) -> object:
    """The expression of a schema that is nothing else."""
    if not isinstance(schema, Mapping) or schema.get("type", "string") != "string":
        return None
    others = {keyword: value for keyword, value in schema.items() if keyword not in ("pattern", "type")}
    return schema.get("pattern") if says_nothing(others) else None


def _counts(node: Node, found: Mapping[str, Any], least: int, most: int | None) -> dict[str, int]:
    """`minProperties` and `maxProperties` as far as the library keeps to them.

    It counts optional properties where they are all that there may be, and then up to one. Of names that may be any, it
    would count one that comes twice as two.
    """
    required = len(found["required"])
    optional = len(found["properties"].keys() - set(found["required"]))
    closed = found.get("additionalProperties") is False and not found["patternProperties"]
    least_more, most_more = max(0, least - required), None if most is None else most - required
    if closed and most_more is not None and most_more >= optional:
        most_more = None
    if not least_more and most_more is None:
        return {}
    if most_more is not None and most_more < 0:
        return {"minProperties": 1, "maxProperties": 0}
    repeated = not closed and least > max(1, required)
    counted = not optional or (closed and least_more <= 1 and most_more in (None, 1))
    if node.alone and not node.intersected and counted and not repeated:
        kept = {"minProperties": least if least_more else None, "maxProperties": None if most_more is None else most}
        return {keyword: value for keyword, value in kept.items() if value is not None}
    for keyword, asks in (("minProperties", least_more > 0), ("maxProperties", most_more is not None)):
        if asks:
            node.leave_out(keyword)
    return {}


def merged(node: Node) -> dict[str, Any] | None:
    """One object for those of `allOf`, where they and `node` only name properties: it can be closed, they cannot."""
    parts = [_referred(node, each) for each in node.items("allOf")]
    others = ("allOf", "unevaluatedProperties")
    if len(parts) < 2 or not _only_names_properties(node.schema, *others):
        return None
    named = [each for each in parts if isinstance(each, Mapping) and each.get("type") == "object"]
    if len(named) < len(parts) or not all(map(_only_names_properties, named)):
        return None
    schemas: dict[str, list[Any]] = {}
    required: list[Any] = []
    for part in [*named, node.schema]:
        for name, schema in part.get("properties", {}).items():
            schemas.setdefault(name, []).append(schema)
        required += part.get("required", [])
    properties = {name: each[0] if len(each) == 1 else {"allOf": each} for name, each in schemas.items()}
    whole = {keyword: value for keyword, value in node.schema.items() if keyword != "allOf"}
    return {**whole, "type": "object", "properties": properties, "required": required}


def _only_names_properties(schema: Mapping[str, Any], *others: str) -> bool:
    valid = isinstance(schema.get("properties", {}), Mapping) and isinstance(schema.get("required", []), list)
    asked = schema.keys() & ASSERTIONS - {"properties", "required", *others}
    return valid and not asked and schema.get("type", "object") == "object"


def _referred(node: Node, schema: object) -> object:
    """What `schema` refers to, where it does nothing else."""
    if isinstance(schema, Mapping) and schema.keys() & ASSERTIONS == {"$ref"} and isinstance(schema["$ref"], str):
        try:
            return node.rewriter.resolve(schema["$ref"])
        except NoGrammar:  # which is reported where it is rewritten
            return schema
    return schema
