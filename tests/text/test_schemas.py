"""Schemas as clients send them: what asks for nothing is dropped, what cannot be kept to is reported or refused."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings, strategies as st
from jsonschema import Draft202012Validator

from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Grammar
from bdh_batch.text.calls import Tool, from_tools, head
from bdh_batch.text.schema_rewriting import MOST_OMISSIONS
from bdh_batch.text.sources import from_lark, from_schema
from bdh_batch.text.vocabulary import byte_vocabulary
from tests.text.drawing import drawn
from tests.text.inline import inline_grammars

VOCABULARY = byte_vocabulary(256)
GRAMMARS = inline_grammars(VOCABULARY, 2**19)
DATA = Path(__file__).parent.parent / "data" / "tools"


async def compiled(schema: Any, strict: bool = False) -> Grammar:
    return await GRAMMARS.compile(from_schema(schema, "the.field", strict))


def takes(grammar: Grammar, value: object) -> bool:
    """Whether a completion can be `value`, written without spaces."""
    constraint = grammar.constraint()
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    for byte in text:
        mask = constraint.mask()
        if mask is not None and not mask[byte >> 3] >> (byte & 7) & 1:
            return False
        if not constraint.accept(byte):
            return False
    return constraint.complete or constraint.mask() is None


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
NOTHING_ASKED: list[tuple[dict[str, Any], object]] = [
    ({"type": "array", "uniqueItems": False}, [1, 1]),
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}}, {"k": [None]}),
    ({"type": "string", "format": "cuid"}, "x"),
    ({"type": "string", "format": "json", "contentEncoding": "base64", "contentMediaType": "a/b"}, "x"),
    ({"type": "integer", "format": "int64"}, 5),
    ({"type": "number", "format": "double", "minLength": "no string"}, 0.5),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "$comment": "c", "title": "t", "const": 1}, 1),
    ({"type": "boolean", "readOnly": True, "deprecated": True, "examples": [1], "default": {"a": 2**60 + 1}}, True),
    ({"type": "boolean", "x-order": 3, "nullable": False, "discriminator": {"propertyName": "k"}}, False),
    ({"type": "boolean", "not": False, "if": {"const": True}, "then": True}, True),
    ({"type": "object", "dependentRequired": {}, "unevaluatedProperties": True}, {"a": 1}),
    ({"type": "array", "contains": {"const": 1}, "minContains": 0, "unevaluatedItems": {}}, []),
    ({"type": "array", "maxItems": 1, "uniqueItems": True}, [1]),
    ({"type": "string", "pattern": None, "minLength": None, "enum": None, "additionalProperties": None}, "x"),
    ({"type": ["string", "null"], "default": None}, None),
    ({"type": "object", "maxProperties": 2, "minProperties": 0, "properties": {"a": {}, "b": {}}}, {"a": 1, "b": 2}),
]


@pytest.mark.parametrize(("schema", "value"), NOTHING_ASKED)
@pytest.mark.parametrize("strict", [False, True])
async def test_what_asks_for_nothing_is_dropped(schema: dict[str, Any], value: object, strict: bool) -> None:
    grammar = await compiled({"type": "array", "prefixItems": [schema], "minItems": 1}, strict)
    assert not grammar.warnings
    assert takes(grammar, [value])


SAID_OTHERWISE: list[tuple[dict[str, Any], list[object], list[object]]] = [
    ({"items": [{"const": 1}, {"const": 2}], "additionalItems": False, "type": "array"}, [[1, 2]], [[2], [1, 2, 3]]),
    ({"type": "array", "unevaluatedItems": {"const": 1}}, [[], [1, 1]], [[2]]),
    ({**OBJECT, "unevaluatedProperties": False}, [{}, {"a": 1}], [{"b": 1}]),
    ({**OBJECT, "unevaluatedProperties": {"const": 1}}, [{"b": 1}], [{"b": 2}]),
    (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"const": 1}},
        [{"b": 1}, {}],
        [{"c": 1}, {"a": 2}],
    ),
    ({"type": "object", "propertyNames": {"pattern": "^x"}}, [{"xy": 1}], [{"y": 1}]),
    ({"$ref": "#/properties/a%25~1~0", "properties": {"a%/~": {"const": 1}}}, [1], [2]),
    ({"allOf": [{"$ref": "#/items/1"}], "items": [{}, {"const": 1}]}, [1], [2]),
    ({"$ref": "#node", "$defs": {"n": {"$anchor": "node", "enum": ["a"]}}}, ["a"], ["b"]),
    ({"$id": "https://x.y/z", "$ref": "https://x.y/z#/$defs/n", "$defs": {"n": {"enum": ["a"]}}}, ["a"], ["b"]),
    ({"$ref": "#/$defs/n", "$defs": {"n": True}}, [1, "a"], []),
    (
        {**OBJECT, "properties": {"a": {"$dynamicRef": "#"}, "b": {"$recursiveRef": "#"}}},
        [{}, {"a": {"b": {}}}],
        [{"a": 1}],
    ),
    ({"type": "object", "properties": {"a": {"not": {}}}}, [{}], [{"a": 1}]),
    ({"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {
        kind: {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab"
    }}, [{"kind": "a"}, {"kind": "b"}], [{"kind": "c"}, {}]),
    ({"oneOf": [{"type": "string"}, {"type": ["integer", "null"]}, {"enum": [[], True]}]}, ["a", 1, None, True], [1.5]),
    ({"oneOf": [{"const": 1}, {"enum": [2, "1"]}]}, [1, 2, "1"], [3]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), SAID_OTHERWISE)
async def test_what_can_be_said_otherwise_is_kept_to(schema: Any, right: list[object], wrong: list[object]) -> None:
    grammar = await compiled(schema, strict=True)
    assert [value for value in right if not takes(grammar, value)] == []
    assert [value for value in wrong if takes(grammar, value)] == []


CLOSED: list[tuple[dict[str, Any], list[object], list[object]]] = [
    (OBJECT, [{}, {"a": 1}], [{"b": 1}]),
    ({**OBJECT, "additionalProperties": True}, [{"b": 1}], []),
    ({**OBJECT, "additionalProperties": {}}, [{"b": 1}], []),
    ({"type": "object", "properties": {}}, [{}], [{"b": 1}]),
    ({"type": "object"}, [{}, {"b": 1}], []),
    ({"type": "object", "required": ["b"]}, [{"b": 1}], [{}]),
    ({**OBJECT, "required": ["b"]}, [{"a": 1, "b": [2]}], [{"a": 1}, {"b": 1, "c": 1}]),
    ({"type": "object", "patternProperties": {"^x": {"const": 1}}}, [{"x": 1}], [{"y": 1}]),
    ({"type": "array", "items": OBJECT}, [[{"a": 1}]], [[{"b": 1}]]),
    ({"anyOf": [OBJECT, {"type": "null"}]}, [None, {"a": 1}], [{"b": 1}]),
    ({"allOf": [{"$ref": "#/$defs/o"}], "$defs": {"o": OBJECT}, "description": "d"}, [{"a": 1}], [{"b": 1}]),
    ({**OBJECT, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": 1}, {"b": 1}], [{}, {"a": 1, "c": 1}]),
    (
        {"allOf": [OBJECT, {"$ref": "#/$defs/o"}], "$defs": {"o": {**OBJECT, "properties": {"b": {"const": 1}}}}},
        [{"a": 1, "b": 1}],
        [{"c": 1}, {"b": 2}],
    ),
    ({"allOf": [OBJECT, {"anyOf": [{"properties": {"b": {}}}]}]}, [{"a": 1, "b": 1}], [{"a": "x"}]),
    ({"$ref": "#/$defs/o", "properties": {"b": {}}, "$defs": {"o": OBJECT}}, [{"b": 1}, {"a": 1}], [{"a": "x"}]),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), CLOSED)
async def test_objects_that_name_properties_have_no_others_by_default(
    schema: Any, right: list[object], wrong: list[object]
) -> None:
    grammar = await compiled(schema)
    assert not grammar.warnings
    assert [value for value in right if not takes(grammar, value)] == []
    assert [value for value in wrong if takes(grammar, value)] == []


LEFT_OUT: list[tuple[str, dict[str, Any], object]] = [
    ("not", {"type": "integer", "not": {"const": 1}}, 1),
    ("if", {"type": "integer", "if": {"const": 1}, "then": False}, 1),
    ("uniqueItems", {"type": "array", "uniqueItems": True}, [1, 1]),
    ("contains", {"type": "array", "contains": {"const": 1}}, [2]),
    ("propertyNames", {"type": "object", "propertyNames": {"minLength": 2}}, {"a": 1}),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}, {"a": 1}),
    ("dependentSchemas", {"type": "object", "dependentSchemas": {"a": False}}, {"a": 1}),
    ("dependencies", {"type": "object", "dependencies": {"a": ["b"]}}, {"a": 1}),
    ("minProperties", {"type": "object", "minProperties": 2}, {"a": 1}),
    ("maxProperties", {**OBJECT, "maxProperties": 1, "additionalProperties": True}, {"a": 1, "b": 1}),
    ("pattern", {"type": "string", "pattern": "^(?!a)"}, "a"),
    ("pattern", {"type": "string", "pattern": r"^(?!\.)\w+@\w+$", "format": "email"}, "a@b.c"),
    ("format", {"type": "string", "format": "uri-reference"}, "%"),
    ("oneOf", {"oneOf": [{"minimum": 1}, {"maximum": 2}]}, 1.5),
    ("$ref", {"$ref": "https://example.com/schema"}, 1),
    ("$dynamicRef", {"$dynamicRef": "#node"}, 1),
    ("patternProperties", {"type": "object", "patternProperties": {"^a": {}, "b": {}}}, {"c": 1}),
    ("unevaluatedItems", {"anyOf": [{"type": "array"}], "unevaluatedItems": False}, [1]),
    (
        "unevaluatedProperties",
        {"$ref": "#/$defs/o", "unevaluatedProperties": False, "$defs": {"o": {"type": "object"}}},
        {"b": 1},
    ),
]


@pytest.mark.parametrize(("keyword", "schema", "value"), LEFT_OUT)
async def test_what_cannot_be_kept_to_is_left_out_and_reported_or_refused_where_strict(
    keyword: str, schema: dict[str, Any], value: object
) -> None:
    outer = {"type": "object", "properties": {"x~y": schema}, "required": ["x~y"]}
    outer |= {"$defs": schema.pop("$defs", {})}
    grammar = await compiled(outer)
    (warning,) = grammar.warnings
    path = f"#/properties/x~0y/{keyword}"
    assert (warning["param"], warning["path"], warning["keyword"]) == ("the.field", path, keyword)
    assert takes(grammar, {"x~y": value})
    with pytest.raises(InvalidRequest, match=re.escape(f"the.field: {path}: {keyword}")) as refused:
        await compiled(outer, strict=True)
    assert refused.value.param == "the.field"


INVALID: list[tuple[str, Any]] = [
    ("#/type", {"type": "strnig"}),
    ("#/type", {"type": ["string", 5]}),
    ("#/properties", {"properties": []}),
    ("#/properties/a", {"properties": {"a": 5}}),
    ("#/required", {"required": [1]}),
    ("#/items", {"items": "string"}),
    ("#/anyOf", {"anyOf": {"type": "string"}}),
    ("#/enum", {"enum": "a"}),
    ("#/pattern", {"pattern": 5}),
    ("#/uniqueItems", {"uniqueItems": 1}),
    ("#/$ref", {"$ref": 5}),
    ("#/$ref", {"$ref": "#/nowhere/0"}),
    ("#/minItems", {"minItems": "1"}),
    ("", {"not": {}}),
    ("", {"anyOf": []}),
    ("", {"type": "object", "properties": {"a": False}, "required": ["a"]}),
]


@pytest.mark.parametrize(("path", "schema"), INVALID)
async def test_what_is_no_schema_or_satisfied_by_nothing_is_refused_by_its_path(path: str, schema: Any) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(f"the.field: {path}")) as refused:
        await compiled(schema)
    assert len(refused.value.message) < 500


async def test_schemas_in_a_grammar_are_rewritten_too_with_their_own_layout() -> None:
    layout = {"whitespace_flexible": False, "item_separator": ";", "key_separator": "="}
    schema = {"type": "array", "items": {"const": 1.0}, "minItems": 2, "uniqueItems": True, "x-guidance": layout}
    lark = f'start: "%json {{" /%json \\{{x/ %json {json.dumps(schema)} // %json {{"const": 9007199254740993}}\n'
    grammar = await GRAMMARS.compile(from_lark(lark, "g"))
    assert [warning["path"] for warning in grammar.warnings] == ["#/uniqueItems"]
    constraint = grammar.constraint()
    assert all(map(constraint.accept, b"%json {%json {x[1;1]"))
    for wrong, why in (('{"const": 9007199254740993}', "#/const"), ('{"const": ', "^g: failed"), ("5", "^g: ")):
        with pytest.raises(InvalidRequest, match=why):
            await GRAMMARS.compile(from_lark(f"start: %json {wrong}", "g"))


async def test_omissions_are_bounded_in_number_and_length() -> None:
    name = "n" * 4000
    schema: dict[str, Any] = {"type": "string", "format": "regex"}
    for _ in range(30):
        schema = {"type": "object", "properties": {name: schema}}
    many = {"type": "object", "properties": {f"{name}{i}": schema for i in range(2)} | {
        str(i): {"type": "array", "uniqueItems": True} for i in range(50)
    }}  # fmt: skip
    warnings = (await inline_grammars(VOCABULARY, 2**20).compile(from_schema(many, "p"))).warnings
    assert len(warnings) == MOST_OMISSIONS + 1
    assert warnings[-1]["text"].startswith("20 more")
    assert len(json.dumps(warnings)) < 20_000


async def test_what_is_referred_to_often_is_written_once() -> None:
    """Else each reference to a part of what another one refers to would double the schema."""
    schema: dict[str, Any] = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20)}}
    path = "#"
    for _ in range(40):
        schema = {"type": "object", "properties": {"deeper": schema, "same": {"$ref": "#"}}}
    names: dict[str, Any] = {}
    for i in range(40):
        path += "/properties/deeper"
        names[f"r{i}"] = {"$ref": path}
    made = await compiled({**schema, "properties": {**schema["properties"], **names}})
    assert takes(made, {"same": {"r39": {"p0": "a"}}})


def tools_of(server: str) -> list[dict[str, Any]]:
    reported = json.loads((DATA / f"{server}.json").read_text(encoding="utf-8"))
    shared = {"$defs": reported["$defs"]} if "$defs" in reported else {}
    return [{**each, "inputSchema": {**shared, **each["inputSchema"]}} for each in reported["tools"]]


@pytest.mark.parametrize(("server", "count"), [("notion", 24), ("playwright", 25)])
@pytest.mark.parametrize("required", [False, True])
async def test_all_tools_of_widely_used_servers_are_taken_at_once(server: str, count: int, required: bool) -> None:
    reported = tools_of(server)
    tools = [Tool(each["name"], each["inputSchema"], f"tools[{i}]") for i, each in enumerate(reported)]
    assert len(tools) == count
    grammar = await GRAMMARS.compile(from_tools(tools, "tools", most=None, required=required))
    assert {warning["keyword"] for warning in grammar.warnings} <= {"oneOf"}
    if required:
        chance = random.Random(1)
        for each in reported:
            inner = f"<tool_call>{head(each['name'])}"
            constraint = grammar.constraint()
            assert all(constraint.accept(byte) for byte in inner.encode())
            text = drawn(constraint, chance, 400).partition("}\n</tool_call>")[0].partition("}</tool_call>")[0]
            if text:
                Draft202012Validator(each["inputSchema"]).validate(json.loads(text))


ZOD: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "count": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
        "share": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "default": 0.5},
        "id": {"type": "string", "format": "cuid2", "pattern": "^[0-9a-z]+$"},
        "mail": {
            "type": "string",
            "format": "email",
            "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]"
            r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        },
        "link": {"type": "string", "format": "uri"},
        "tags": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
        "levels": {
            "type": "object",
            "propertyNames": {"type": "string", "enum": ["low", "high"]},
            "additionalProperties": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
            "required": ["low", "high"],
        },
        "name": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "never": {"not": {}},
        "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
        "either": {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"type": "string", "const": kind}}, "required": ["kind"]}
                for kind in ("circle", "square")
            ]
        },
        "children": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["count", "levels"],
    "additionalProperties": False,
}


async def test_what_zod_writes_is_taken_but_for_expressions_that_look_ahead() -> None:
    grammar = await compiled(ZOD)
    assert [warning["path"] for warning in grammar.warnings] == ["#/properties/mail/pattern"]
    levels = {"low": 1, "high": -2}
    assert takes(grammar, {"count": 1, "levels": levels})
    full: dict[str, Any] = {"count": 9007199254740991, "share": 0.25, "id": "a1", "mail": "a@b.c", "link": "a:b"}
    full |= {"tags": {"x": [1]}, "levels": levels, "name": None, "pair": ["a", 1.5], "either": {"kind": "square"}}
    assert takes(grammar, {**full, "children": [full]})
    for wrong in ({"count": 0}, {"count": 9007199254740992}, {"levels": {"low": 1}}, {"share": 1}, {"mail": "a"}):
        assert not takes(grammar, {**full, **wrong}), wrong
    assert not takes(grammar, {**full, "never": 1})


NAMES = st.sampled_from(["a", "b", "c"])
LEAVES: st.SearchStrategy[Any] = st.sampled_from(
    [
        *({}, True, {"type": "null"}, {"const": 1}, {"enum": ["a", 2, None]}, {"type": "boolean", "title": "t"}),
        *({"type": "integer", "minimum": 3}, {"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^a"}),
        *({"type": ["string", "null"], "format": "date"}, {"not": {"const": 1}}, {"$ref": "#"}, {"$ref": "#/$defs/d"}),
    ]
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(NAMES, inner, max_size=3),
            "required": st.lists(NAMES, max_size=2),
            "additionalProperties": inner | st.booleans(),
            "unevaluatedProperties": st.booleans(),
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "^x"]), inner, max_size=2),
            "propertyNames": st.sampled_from([{"type": "string"}, {"enum": ["a", "x"]}, {"pattern": "^x"}]),
            "minProperties": st.integers(0, 3),
            "maxProperties": st.integers(0, 3),
            "dependentRequired": st.just({"a": ["b"]}),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner,
            "prefixItems": st.lists(inner, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(0, 3),
            "uniqueItems": st.booleans(),
        },
    )
    several = st.lists(inner, min_size=1, max_size=3)
    unions = st.builds(lambda key, members: {key: members}, st.sampled_from(["anyOf", "oneOf", "allOf"]), several)
    beside = st.builds(lambda one, other: {**one, **other}, objects, unions)
    return objects | arrays | unions | beside


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(SCHEMAS, SCHEMAS, st.booleans(), st.randoms(use_true_random=False))
async def test_completions_satisfy_every_schema_of_which_nothing_was_left_out(
    schema: Any, definition: Any, strict: bool, chance: random.Random
) -> None:
    whole = {**schema, "$defs": {"d": definition}} if isinstance(schema, dict) else {"$defs": {"d": definition}}
    (made,) = await asyncio.gather(compiled(whole, strict), return_exceptions=True)
    if not isinstance(made, Grammar):
        assert isinstance(made, InvalidRequest)
        return
    assert not (strict and made.warnings)
    for _ in range(4):
        text = drawn(made.constraint(), chance, 80, likely=b'"":{}[],,abcx13')
        if text and not made.warnings:
            try:
                Draft202012Validator(whole).validate(json.loads(text))
            except RecursionError:  # a reference back to itself at the same value: the library never ends
                reject()
