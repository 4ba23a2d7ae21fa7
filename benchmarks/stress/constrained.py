"""Many completions that have to follow schemas and expressions, from a running server at hot temperatures: each is
checked.

A finished completion has to validate; one that was cut by its length has to be a prefix of what would. Neither is
checked with what made it: `jsonschema` and `regex` judge, and `jiter` reads JSON that is cut.

    python -m benchmarks.stress.constrained --url http://127.0.0.1:8000 --answers 500
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jiter
import jsonschema
import regex

from benchmarks.client import COMPLETIONS, Client

WORD = {"type": "string", "maxLength": 6}
TREE = {
    "type": "object",
    "properties": {"name": WORD, "children": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/tree"}}},
    "required": ["name", "children"],
    "additionalProperties": False,
}


def _object(**properties: Any) -> dict[str, Any]:
    """An object that has all of `properties`, and no other."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "integer": {"type": "integer"},
    "small": {"type": "integer", "minimum": -5, "maximum": 120},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "text": {"type": "string", "minLength": 2, "maxLength": 12},
    "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "enum": {"enum": ["red", "green", 3, None, {"deep": ["blue"]}]},
    "person": _object(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 150}, email={"type": "boolean"}),
    "optional": {"type": "object", "properties": {"a": WORD, "b": {"type": "null"}}, "additionalProperties": False},
    "list": {"type": "array", "items": {"enum": ["x", "y", "z"]}, "minItems": 2, "maxItems": 5},
    "tuple": {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    "either": {"anyOf": [_object(kind={"const": "cat"}, lives={"enum": [7, 9]}), _object(kind={"const": "dog"})]},
    "tree": {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}},
    "unicode": _object(größe={"const": "é\u2028😀"}, wert={"type": ["string", "null"], "maxLength": 3}),
    "date": {"type": "string", "format": "date"},
}
EXPRESSIONS = {
    "digits": r"[0-9]+",
    "phone": r"\+[1-9][0-9]{1,3} [0-9]{3}-[0-9]{4}( ext\.? [0-9]+)?",
    "hex": r"#(?:[0-9a-f]{3}){1,2}",
    "sentence": r"(The|A) (cat|dog|é+) (sat|ran)( and (sat|ran))*\.",
    "catastrophic": r"(a|aa|a?b)*c{1,30}(x+x+)+y",
}
CASES = [*SCHEMAS, *EXPRESSIONS]
BOUNDS = ("required", "minItems", "minLength", "pattern", "enum", "const", "format", "minimum", "maximum")


def asked(case: str) -> dict[str, Any]:
    """The fields of a request that ask for `case`."""
    if case in EXPRESSIONS:
        return {"structured_outputs": {"regex": EXPRESSIONS[case]}}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": case, "schema": SCHEMAS[case]}}}


def check(case: str, choice: Mapping[str, Any]) -> None:
    """Raises AssertionError, or one of the judges' errors, where a choice with `token_ids` is not what `case` asks."""
    text = codecs.getincrementaldecoder("utf-8")("strict").decode(bytes(choice["token_ids"]))
    whole = choice["finish_reason"] == "stop"
    assert whole or choice["finish_reason"] == "length", choice
    if case in EXPRESSIONS:
        assert regex.fullmatch(EXPRESSIONS[case], text, partial=not whole), (case, text)
    elif whole:
        jsonschema.validate(json.loads(text), SCHEMAS[case])
    elif text:
        begun = jiter.from_json(text.encode(), partial_mode="trailing-strings") if text.strip('-"') else None
        if begun is not None:
            jsonschema.validate(begun, _loosened(SCHEMAS[case]))


def _loosened(schema: Any) -> Any:
    """What is left of a schema for a prefix of what it describes: kinds, and names of properties."""
    if isinstance(schema, dict):
        return {key: _loosened(value) for key, value in schema.items() if key not in BOUNDS}
    return [_loosened(value) for value in schema] if isinstance(schema, list) else schema


def bodies(completions: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many requests, over all cases in turn."""
    rng = random.Random(seed)
    for number in range(completions):
        case = CASES[number % len(CASES)]
        body = {"seed": rng.getrandbits(32), "temperature": rng.choice((0, 0.7, 1, 1.5, 2)), "return_token_ids": True}
        yield case, body | asked(case) | {"prompt": "JSON:\n", "max_tokens": rng.choice((8, 40, 120))}


async def run(url: str, completions: int, seed: int, at_once: int) -> dict[str, int]:
    """How the completions ended, all of them right."""
    ends: Counter[str] = Counter()
    limit = asyncio.Semaphore(at_once)
    client = Client(url)

    async def ask(case: str, body: Mapping[str, Any]) -> None:
        async with limit:
            response = await client.post(COMPLETIONS, body)
        (choice,) = response["choices"]
        check(case, choice)
        ends[choice["finish_reason"]] += 1

    try:
        await asyncio.gather(*(ask(case, body) for case, body in bodies(completions, seed)))
    finally:
        client.close()
    return dict(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(run(arguments.url, arguments.answers, arguments.seed, arguments.at_once))))


if __name__ == "__main__":
    main()
