"""Strings, numbers and arrays of a schema, as the grammar library takes them."""

from __future__ import annotations

from typing import Any

from bdh_batch.text.schema_node import OF_NUMBERS, Node, says_nothing
from bdh_batch.text.schema_numbers import EmptyInterval, digits_of, numeric_keywords

ENFORCED = {
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
}
# JSON Schema defines these, too; any other format is an annotation.
NOT_ENFORCED = {
    *("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
}


def of_strings(node: Node, least: int | None, most: int | None) -> dict[str, Any]:
    """What `node` says of strings, whose length is from `least` to `most`."""
    found: dict[str, Any] = {"minLength": least, "maxLength": most}
    for keyword in ("pattern", "format"):
        found[keyword] = node.schema.get(keyword)
        if not isinstance(found[keyword], str | None):
            raise node.refusal(keyword, "should be a string")
    if found["format"] in NOT_ENFORCED:
        node.leave_out("format", f"{found['format']} cannot be enforced while generating")
    if found["format"] not in ENFORCED:
        found["format"] = None
    return _compiling(node, {keyword: value for keyword, value in found.items() if value is not None})


def _compiling(node: Node, found: dict[str, Any]) -> dict[str, Any]:
    """`found` without the expressions that the library lacks: those that look ahead or refer back, and large ones."""
    for keyword in ("pattern", "format"):
        if keyword in found and not node.rewriter.compiles({"type": "string", **found}):
            node.leave_out(keyword)
            del found[keyword]
    return found


def of_numbers(node: Node) -> dict[str, Any]:
    types = node.types or ["number"]
    if not node.schema.keys() & OF_NUMBERS:
        return {}
    alone = node.alone and not node.intersected
    try:
        found = numeric_keywords(node.schema, "number" not in types, alone)
    except EmptyInterval:
        return {"minimum": 1, "maximum": 0}
    if "multipleOf" in found and not alone:
        node.rewriter.intersect_step(digits_of(found["multipleOf"]))
    return found


def of_arrays(node: Node, least: int | None, most: int | None) -> dict[str, Any]:
    """What `node` says of arrays, whose length is from `least` to `most`. Draft 7 has lists for `items`."""
    alone = node.alone and not node.intersected
    first, rest, rest_keyword = node.items("prefixItems"), node.schema.get("items"), "items"
    first_keyword = "prefixItems"
    if isinstance(rest, list):
        first, first_keyword = rest, "items"
        rest, rest_keyword = node.schema.get("additionalItems"), "additionalItems"
    if rest is None and not node.intersected:
        rest, rest_keyword = node.schema.get("unevaluatedItems"), "unevaluatedItems"
    elif rest is None and not says_nothing(node.schema.get("unevaluatedItems", True)):
        node.leave_out("unevaluatedItems")
    found: dict[str, Any] = {"minItems": least or None, "maxItems": most}
    if first:
        found["prefixItems"] = [node.child(each, alone, first_keyword, str(i)) for i, each in enumerate(first)]
    if rest is not None:
        found["items"] = node.child(rest, alone, rest_keyword)
    _leave_out_counting(node, most)
    return {keyword: value for keyword, value in found.items() if value is not None}


def _leave_out_counting(node: Node, most: int | None) -> None:
    unique = node.schema.get("uniqueItems", False)
    if not isinstance(unique, bool):
        raise node.refusal("uniqueItems", "should be a boolean")
    if unique and (most is None or most > 1):
        node.leave_out("uniqueItems")
    if "contains" in node.schema and (node.schema.get("minContains") != 0 or "maxContains" in node.schema):
        node.leave_out("contains")
