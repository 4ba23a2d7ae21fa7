"""What hostile clients send: raw HTTP requests, each the smallest of its kind (`attacks.py`)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import orjson

from benchmarks.raw import MIB, request

NONSENSE = 2_000  # lists and objects in a field of nonsense: more of them than fill a body
LONGEST_HEADER = 4 * MIB  # of a file of a state
BODY = 4 * MIB - 4096  # just under the default of limits.max_body_bytes

Body = dict[str, Any]


def post(path: str, content: bytes, length: int | None = None) -> bytes:
    return request("POST", path, content, length=length)


def completion(**body: Any) -> bytes:
    return post("/v1/completions", orjson.dumps({"prompt": "a", "max_tokens": 8} | body))


def chat(**body: Any) -> bytes:
    return post(
        "/v1/chat/completions",
        orjson.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 8} | body),
    )


def turn(**body: Any) -> bytes:
    return post("/v1/responses", orjson.dumps({"input": "a", "max_output_tokens": 8} | body))


def file(header: bytes, tensor: bytes = b"", length: int | None = None) -> bytes:
    """An upload of a state, with the header of a safetensors file."""
    content = len(header).to_bytes(8, "little") + header + tensor
    lines = ["POST /v1/states/content HTTP/1.1", "host: localhost", "connection: close"]
    lines += ["content-type: application/octet-stream", f"content-length: {len(content) if length is None else length}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


def state_header(tokens: str = "[1]", count: int = 1, dimensions: Sequence[int] = (2, 4, 128, 32)) -> bytes:
    size = 4 * math.prod(dimensions)
    known = {"fingerprint": "x", "xxh3_128": "0" * 32, "token_ids": tokens, "tokens": str(count)}
    tensor = {"dtype": "F32", "shape": [*dimensions], "data_offsets": [0, size]}
    return orjson.dumps({"__metadata__": known, "state": tensor})


def grammar(text: str) -> bytes:
    return completion(structured_outputs={"grammar": text})


def schema(value: object) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


def tool(value: object) -> bytes:
    return chat(tools=[{"type": "function", "function": {"name": "f", "parameters": value}}], tool_choice="required")


def array(item: str, size: int = BODY) -> str:
    """A JSON array of as many copies of `item` as fit."""
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


def with_array(path: str, rest: str, item: str, size: int = BODY - 1024) -> bytes:
    return post(path, rest.replace("@", array(item, size)).encode())


def chained_definitions(count: int) -> Body:
    chain = {f"d{i}": {"anyOf": [{}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(count)}
    return {"$defs": {**chain, f"d{count}": {}}, "$ref": "#/$defs/d0"}


def chained_rules(count: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(count)) + f'\nr{count}: "a"'


def chained_terminals(count: int) -> str:
    return "start: T0\n" + "\n".join(f'T{i}: T{i + 1} | "b"' for i in range(count)) + f'\nT{count}: "a"'


def nested(count: int) -> Body:
    value: Body = {"type": "string"}
    for _ in range(count):
        value = {"type": "array", "items": value}
    return value


def intersection() -> str:
    return "start: T\nT: " + " & ".join(f"/((a|b){{{length}}})*/" for length in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41))


HUGE = state_header(dimensions=[2**26])
OVERLAPPING = ["a" * (1023 - i) + "b" for i in range(16)]
NO_INPUT = '{"input":@}'
ITEMS = (
    '{"role":"user","content":"a"}',
    '{"type":"function_call","call_id":"1","name":"f","arguments":"{}"}',
    '{"type":"function_call_output","call_id":"1","output":"a"}',
    '{"type":"item_reference","id":"msg_1_0"}',
    '{"type":"reasoning","id":"a","summary":[]}',
    "{}",
)
NOTHING_SAID = '{"messages":@}'
FORCED = {"regex": "a{60000}"}


def nonsense(seed: int) -> bytes:
    """A valid body of random JSON where fields of the API are, some of it deep, some of it wide."""
    chance = random.Random(seed)
    fields = (
        "messages",
        "input",
        "text",
        "previous_response_id",
        "include",
        "stop",
        "logit_bias",
        "tools",
        "response_format",
        "metadata",
        "prompt",
        "stream_options",
    )

    def value(depth: int, values: Iterator[int]) -> object:
        width = chance.choice((0, 1, 3, 200))
        kind = chance.random()
        if depth == 0 or kind < 0.3 or next(values) > NONSENSE:
            return chance.choice((0, 1e308, "", "a" * 1000, None, True, -(2**63)))
        if kind < 0.65:
            return [value(depth - 1, values) for _ in range(width)]
        return {
            chance.choice(("a", "b", "type", "role", "content", "x" * 50)) + str(i): value(depth - 1, values)
            for i in range(width)
        }

    paths = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize")
    path = chance.choice(paths)
    return post(path, orjson.dumps({field: value(3, count()) for field in chance.sample(fields, 4)})[:BODY])
