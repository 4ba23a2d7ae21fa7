"""Numbers of schemas are kept exactly, compared as fractions, or refused by the name of their keyword."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import orjson
import pytest
from hypothesis import given, settings, strategies as st
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Grammar
from bdh_batch.text.schema_numbers import LARGEST_INTEGER
from bdh_batch.text.sources import from_schema
from bdh_batch.text.vocabulary import byte_vocabulary
from tests.text.drawing import drawn
from tests.text.inline import inline_grammars

VOCABULARY = byte_vocabulary(256)
GRAMMARS = inline_grammars(VOCABULARY)


def multiple_of(validator: Any, step: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, int | Decimal) and Fraction(instance) % Fraction(step):
        yield ValidationError(f"{instance} is no multiple of {step}")


Exact: Any = extend(Draft202012Validator, {"multipleOf": multiple_of})


def exactly(text: str | bytes) -> Any:
    return json.loads(text, parse_float=Decimal)


async def compiled(schema: str) -> Grammar:
    """As a server has it from a body."""
    return await GRAMMARS.compile(from_schema(orjson.loads(schema), "the.field"))


INTEGERS = st.sampled_from(
    ["0", "1", "-1", "7", "-0", "1.0", "1e2", "97", str(2**53), str(2**53 + 1), str(-(2**53) - 1)]
)
INTEGERS |= st.sampled_from([str(sign * (2**63 + more)) for sign in (1, -1) for more in (-1024, -1, 0, 1)])
INTEGERS |= st.sampled_from(["1234567890123456789", str(2**64 - 1), str(2**64), str(10**30), "9007199254740993.0"])
INTEGERS |= st.integers(-(10**20), 10**20).map(str)
FRACTIONS = st.sampled_from(["0.5", "-0.5", "0.1", "1e-300", "-0.0", "1e300", "0.999", "1.5", "1e17", "123456789.125"])
FRACTIONS |= st.floats(-10, 10, allow_nan=False).map(repr)
NUMBERS = INTEGERS | FRACTIONS
STEPS = st.sampled_from(["1", "2", "3", "0.5", "0.01", "0.1", "7", "10", "0.07", "2.50", "1e1", "4294967297"])
BOUNDS = st.dictionaries(st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]), NUMBERS)


def written(schema: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in schema.items()) + "}"


@st.composite
def numeric(draw: st.DrawFn) -> str:
    """A schema of numbers: bounds, perhaps a step, perhaps in two parts, perhaps near each other."""
    kind = draw(st.sampled_from(['"integer"', '"number"', '["integer", "null"]', '["string", "number"]']))
    bounds = draw(BOUNDS)
    if draw(st.booleans()):
        base = draw(st.integers(-3, 3) | st.sampled_from([2**53, 10**18, -(2**62)]))
        width = draw(st.sampled_from(["0.5", "0.25", "1", "0.001"]))
        bounds = {draw(st.sampled_from(["minimum", "exclusiveMinimum"])): str(base)}
        bounds[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = str(base + Fraction(width).limit_denominator())
        bounds = {key: repr(float(Fraction(value))) if "/" in value else value for key, value in bounds.items()}
    step = {"multipleOf": draw(STEPS)} if draw(st.integers(0, 3)) == 0 else {}
    if draw(st.integers(0, 3)) == 0:
        several = [*bounds.items(), *(("multipleOf", each) for each in draw(st.lists(STEPS, max_size=2)))]
        parts = ", ".join(written({"type": kind, key: value}) for key, value in several)
        return f'{{"allOf": [{parts or "{}"}]}}'
    return written({"type": kind} | bounds | step)


CONSTANTS = (NUMBERS | st.just('"a"') | st.lists(NUMBERS, max_size=2).map(lambda each: f"[{', '.join(each)}]")).map(str)
SCHEMAS = (
    numeric()
    | CONSTANTS.map(lambda value: written({"const": value}))
    | st.lists(CONSTANTS, min_size=1, max_size=3).map(lambda values: written({"enum": f"[{', '.join(values)}]"}))
    | st.tuples(CONSTANTS, numeric()).map(lambda two: f'{{"allOf": [{{"const": {two[0]}}}, {two[1]}]}}')
    | numeric().map(lambda items: written({"type": '"array"', "items": items, "minItems": "1.0", "maxItems": "2e0"}))
)


@settings(max_examples=250, deadline=None)
@given(SCHEMAS, st.randoms(use_true_random=False))
async def test_what_is_generated_satisfies_the_schema_as_it_was_written(schema: str, chance: random.Random) -> None:
    (grammar,) = await asyncio.gather(compiled(schema), return_exceptions=True)
    if not isinstance(grammar, Grammar):
        assert isinstance(grammar, InvalidRequest)
        assert grammar.param == "the.field"
        return
    validator = Exact(exactly(schema))
    for _ in range(5):
        text = drawn(grammar.constraint(), chance)
        if text and not re.search(r"[eE].?\d{4}", text):  # which a Decimal cannot hold
            validator.validate(exactly(text))


KEPT = [
    ('{"type": "integer", "maximum": 15, "allOf": [{"multipleOf": 4}, {"multipleOf": 6, "minimum": 1}]}', {"12"}),
    ('{"type": "integer", "minimum": 9007199254740993, "maximum": 9007199254740995}', {"9007199254740994"}),
    ('{"type": "integer", "minimum": 4.5, "maximum": 5e0}', {"5"}),
    ('{"type": "integer", "exclusiveMinimum": 1.0, "exclusiveMaximum": 3}', {"2"}),
    ('{"type": "integer", "exclusiveMinimum": true, "minimum": 1, "maximum": 2}', {"2"}),
    ('{"type": "integer", "minimum": -0.0, "maximum": -0, "multipleOf": 1}', {"0"}),
    ('{"const": -0}', {"0"}),
    ('{"const": 1.0}', {"1"}),
    ('{"const": 1152921504606846976}', {str(2**60)}),
    ('{"const": [1, {"a": 9007199254740992}]}', {'[1,{"a":9007199254740992}]'}),
    (f'{{"type": "integer", "minimum": {LARGEST_INTEGER}}}', {str(LARGEST_INTEGER)}),
    (f'{{"type": "integer", "maximum": {-LARGEST_INTEGER}}}', {str(-LARGEST_INTEGER)}),
    ('{"type": "array", "items": {"const": 1}, "minItems": 2.0, "maxItems": 2e0}', {"[1,1]"}),
    ('{"type": "string", "minLength": 1.0, "maxLength": 1, "pattern": "^a*$"}', {'"a"'}),
    ('{"type": "string", "maxLength": 9007199254740991, "pattern": "^ab$"}', {'"ab"'}),
]


@pytest.mark.parametrize(("schema", "texts"), KEPT)
async def test_numbers_are_kept(schema: str, texts: set[str]) -> None:
    grammar, chance = await compiled(schema), random.Random(1)
    assert {drawn(grammar.constraint(), chance).replace(" ", "") for _ in range(40)} == texts


OPEN = [
    '{"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}',
    '{"type": "number", "exclusiveMinimum": 0, "maximum": 1e-7}',
    '{"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}',
    '{"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 3.001}',
    '{"type": "number", "exclusiveMaximum": -3, "minimum": -3.25}',
    '{"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "number", "maximum": 0.5}]}',
    '{"type": "number", "minimum": 1e-300, "maximum": 1}',
    '{"type": "integer", "minimum": 0, "maximum": 18446744073709551615}',
    '{"type": "integer", "minimum": -9223372036854775808, "maximum": 9223372036854775807}',
    '{"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991}',
    '{"type": "number", "maximum": 1e300}',
]


@pytest.mark.parametrize("schema", OPEN)
async def test_bounds_are_accepted_and_kept(schema: str) -> None:
    grammar, chance, validator = await compiled(schema), random.Random(2), Exact(exactly(schema))
    texts = {drawn(grammar.constraint(), chance) for _ in range(60)} - {""}
    assert texts
    for text in texts:
        validator.validate(exactly(text))


REFUSED = [
    ('{"const": 1234567890123456789}', "const"),
    ('{"const": 9007199254740993}', "const"),
    ('{"const": -9223372036854775808}', "const"),
    ('{"const": 18446744073709551616}', "const"),
    ('{"enum": [1, {"a": [9007199254740993]}]}', "enum"),
    ('{"type": "integer", "minimum": 9223372036854775808, "maximum": 9223372036854775809}', "minimum"),
    ('{"type": "integer", "minimum": 9007199254740993, "maximum": 9007199254740993}', "minimum"),
    ('{"type": "integer", "maximum": -18446744073709551616}', "maximum"),
    ('{"type": "number", "minimum": 1e30}', "minimum"),
    ('{"type": "number", "multipleOf": 1.1e-8}', "multipleOf"),
    ('{"type": "integer", "multipleOf": 4294967296}', "multipleOf"),
    ('{"type": "integer", "multipleOf": 0}', "multipleOf"),
    ('{"allOf": [{"type": "integer", "multipleOf": 99991}, {"multipleOf": 99989}]}', "allOf/"),
    ('{"type": "integer", "minimum": "3"}', "minimum"),
    ('{"type": "integer", "maximum": true}', "maximum"),
    ('{"type": "string", "minLength": 1.5}', "minLength"),
    ('{"type": "string", "maxLength": -1}', "maxLength"),
    ('{"type": "array", "minItems": 1e20}', "minItems"),
    ('{"type": "integer", "minimum": 3, "maximum": 2}', ""),
    ('{"type": "integer", "minimum": 1000000000000000000, "maximum": 1000000000000000001, "multipleOf": 3}', ""),
    ('{"type": "integer", "minimum": 4, "maximum": 6, "multipleOf": 3.5}', ""),
    ('{"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 6, "multipleOf": 3}', ""),
    ('{"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}', ""),
    ('{"type": "number", "minimum": 3, "exclusiveMaximum": 3}', ""),
]


@pytest.mark.parametrize(("schema", "keyword"), REFUSED)
@pytest.mark.parametrize("inside", ["%s", '{"type": "object", "properties": {"a/b": %s}, "required": ["a/b"]}'])
async def test_what_cannot_be_kept_exactly_is_refused_by_name(schema: str, keyword: str, inside: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await compiled(inside % schema)
    where = "#" if inside == "%s" else "#/properties/a~1b"
    assert refused.value.param == "the.field"
    assert refused.value.message.startswith(f"the.field: {where}/{keyword}" if keyword else "the.field: ")
