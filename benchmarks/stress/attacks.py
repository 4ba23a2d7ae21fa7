"""Hostile requests, each the smallest of its kind that once harmed a server of this sort, and its relatives.

An attack is a list of raw HTTP requests, each sent on a connection of its own by a client that leaves after a while:

    python -m benchmarks.stress.attacks --port 8000 "grammar: chain of rules"

waits for a line on its standard input, so that what it sends is made before anything is measured, and prints what
came of it as one line of JSON. `benchmarks/stress/hostile.py` runs all of them and watches the server. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import orjson

from benchmarks.raw import CLOSED, MIB, exchange
from benchmarks.stress.payloads import (
    BODY,
    FORCED,
    HUGE,
    ITEMS,
    LONGEST_HEADER,
    NO_INPUT,
    NOTHING_SAID,
    OVERLAPPING,
    array,
    chained_definitions,
    chained_rules,
    chained_terminals,
    completion,
    file,
    grammar,
    intersection,
    nested,
    nonsense,
    post,
    schema,
    state_header,
    tool,
    turn,
    with_array,
)

FROM = "127.0.0.66"  # the attackers' own address: fairness between callers is part of what is attacked


@dataclass(frozen=True)
class Attack:
    """
    Args:
        payloads: makes the requests, as they go over the wire.
        patience: seconds after which a client leaves.
        together: clients at a time.
    """

    payloads: Callable[[], Iterator[bytes]]
    patience: float = 15.0
    together: int = 4


ATTACKS: dict[str, Attack] = {
    # What makes a grammar library recurse.
    "grammar: chain of rules": Attack(lambda: iter([grammar(chained_rules(3000))] * 2)),
    "grammar: chain of terminals": Attack(lambda: iter([grammar(chained_terminals(3000))] * 2)),
    "grammar: nested groups": Attack(lambda: iter([grammar("start: " + "(" * 5000 + '"a"' + ")" * 5000)] * 2)),
    "grammar: nested expression": Attack(
        lambda: iter([completion(structured_outputs={"regex": "(" * 5000 + "a" + ")*" * 5000})] * 2)
    ),
    "schema: chain of definitions": Attack(lambda: iter([schema(chained_definitions(1200))] * 2)),
    "schema: chain of definitions in a tool": Attack(lambda: iter([tool(chained_definitions(1200))] * 2)),
    "schema: least integer": Attack(lambda: iter([schema({"const": -(2**63)})] * 2)),
    "schema: nested deep": Attack(lambda: iter([schema(nested(120))] * 2)),
    # What it takes too long, or too much memory, to compile.
    "compiler: multiples of a large number": Attack(
        lambda: iter([schema({"type": "integer", "multipleOf": 99999989 + 2 * i}) for i in range(4)])
    ),
    "compiler: many large automata": Attack(
        lambda: iter([schema({"type": "integer", "multipleOf": 999983 - 2 * i}) for i in range(40)]), together=8
    ),
    "compiler: intersection": Attack(lambda: iter([grammar(intersection())] * 3)),
    "compiler: counted repetitions": Attack(
        lambda: iter([completion(structured_outputs={"regex": "((a{1,900}){1,900}){1,900}"})] * 3)
    ),
    "compiler: ambiguous": Attack(lambda: iter([grammar('start: x\nx: x x | x x x | "a" | ""')] * 3)),
    # Lists, times fan-out.
    "fan-out: stop tokens": Attack(
        lambda: iter([completion(prompt=["a"] * 128, n=16, stop_token_ids=[i % 256 for i in range(30000)])] * 2)
    ),
    "fan-out: biases": Attack(
        lambda: iter(
            [completion(prompt=["a"] * 64, logit_bias={str(i): 1 for i in range(256)}, max_tokens=200, temperature=2)]
        )
    ),
    "fan-out: many sequences": Attack(lambda: iter([completion(prompt=["abc"] * 128, n=16, max_tokens=32)] * 2)),
    "fan-out: many sequences, left at once": Attack(
        lambda: iter([completion(prompt=["abc"] * 128, n=16, max_tokens=32)] * 8), patience=0.3
    ),
    # Errors that multiply.
    "errors: messages": Attack(lambda: iter([with_array("/v1/chat/completions", NOTHING_SAID, "0")] * 2)),
    "errors: stop strings": Attack(lambda: iter([with_array("/v1/completions", '{"prompt":"a","stop":@}', "0")] * 2)),
    "errors: stop tokens": Attack(
        lambda: iter([with_array("/v1/completions", '{"prompt":"a","stop_token_ids":@}', '""')] * 2)
    ),
    "errors: prompts": Attack(lambda: iter([with_array("/v1/completions", '{"prompt":@}', "{}")] * 2)),
    "errors: unknown fields": Attack(
        lambda: iter(
            [post("/v1/completions", orjson.dumps({"prompt": "a"} | {f"x{i}": 0 for i in range(300_000)}))] * 2
        )
    ),
    # Long bodies that are, or look, right.
    "bodies: messages": Attack(
        lambda: iter([with_array("/v1/chat/completions", NOTHING_SAID, '{"role":"user","content":"a"}')] * 2)
    ),
    "bodies: tool calls": Attack(
        lambda: iter(
            [
                with_array(
                    "/v1/chat/completions",
                    '{"messages":[{"role":"assistant","tool_calls":@}]}',
                    '{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}',
                )
            ]
            * 2
        )
    ),
    "bodies: template variables": Attack(
        lambda: iter(
            [
                with_array(
                    "/v1/chat/completions",
                    '{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"x":@}}',
                    "[]",
                )
            ]
            * 2
        )
    ),
    "bodies: empty lists": Attack(lambda: iter([with_array("/v1/completions", '{"prompt":@}', "[]")] * 2)),
    "bodies: prompts of one token": Attack(lambda: iter([with_array("/v1/completions", '{"prompt":@}', "[1]")] * 2)),
    "bodies: brackets": Attack(lambda: iter([post("/v1/completions", b'{"prompt":' + b"[" * 2 * MIB)] * 2)),
    "bodies: choices": Attack(
        lambda: iter([with_array("/v1/completions", '{"prompt":"a","structured_outputs":{"choice":@}}', '"a"')] * 2)
    ),
    "bodies: one long text": Attack(lambda: iter([completion(prompt="a" * (BODY - 1024), max_tokens=1)] * 2), 5.0),
    "bodies: tokens by name": Attack(
        lambda: iter([post("/tokenize", orjson.dumps({"prompt": "a" * (BODY - 1024), "return_token_strs": True}))] * 2)
    ),
    "bodies: a million tokens to text": Attack(lambda: iter([with_array("/detokenize", '{"tokens":@}', "97")] * 2)),
    "bodies: scores of a long prompt": Attack(
        lambda: iter([completion(prompt="a" * 131_000, echo=True, logprobs=20, max_tokens=0)]), patience=120.0
    ),
    "responses: items": Attack(
        lambda: iter([with_array("/v1/responses", NO_INPUT, item) for item in ITEMS for _ in range(2)])
    ),
    "responses: parts": Attack(
        lambda: iter(
            [
                with_array(
                    "/v1/responses",
                    '{"input":[{"role":"user","content":@}]}',
                    '{"type":"input_text","text":"a"}',
                )
            ]
            * 2
        )
    ),
    "responses: one long text": Attack(lambda: iter([turn(input="a" * (BODY - 1024), max_output_tokens=1)] * 2), 5.0),
    "responses: others' ids": Attack(
        lambda: iter([turn(previous_response_id=f"resp_{number:032x}") for number in range(2000)]), together=32
    ),
    "responses: others' items": Attack(
        lambda: iter(
            [
                turn(input=[{"type": "item_reference", "id": f"msg_{number:032x}_0"} for number in range(4000)])
                for _ in range(8)
            ]
        )
    ),
    "responses: long ones to store": Attack(
        lambda: iter([turn(instructions="a" * 110_000, max_output_tokens=1)] * 16), patience=8.0
    ),
    "responses: a crowd in the background": Attack(
        lambda: iter([turn(background=True, max_output_tokens=2000)] * 200), together=50
    ),
    "states: headers without end": Attack(
        lambda: iter(
            [
                *[file(b"[" * (LONGEST_HEADER - 8)), file(b'{"a":' * (LONGEST_HEADER // 5))],
                *[file(array("1", LONGEST_HEADER).encode()), file(b"{" + b" " * (LONGEST_HEADER - 8))],
                *[file(state_header("[" + "1," * 2_000_000 + "1]", 2_000_001), bytes(2**17))] * 4,
                *[file(state_header("[" * 4_000_000), bytes(2**17))] * 2,
            ]
        )
    ),
    "states: files that do not come": Attack(
        lambda: iter([file(HUGE, bytes(65536), 8 + len(HUGE) + 2**28)] * 300), patience=5.0, together=300
    ),
    "states: large files": Attack(
        lambda: iter([file(state_header(dimensions=[2**24]), bytes(2**26))] * 16), patience=8.0, together=16
    ),
    "states: of long prompts": Attack(
        lambda: iter([post("/v1/states", orjson.dumps({"prompt": "a" * 110_000}))] * 16), patience=8.0
    ),
    "states: very many": Attack(
        lambda: iter([post("/v1/states", orjson.dumps({"prompt": f"{n}"})) for n in range(500)]), together=32
    ),
    "states: others' ids": Attack(
        lambda: iter([completion(state=f"st_{number:032x}") for number in range(2000)]), together=32
    ),
    "bodies: nonsense": Attack(lambda: iter([nonsense(seed) for seed in range(20)])),
    # Costs per token that a request sets.
    "tokens: overlapping stop strings": Attack(
        lambda: iter([completion(prompt=["a"] * 32, stop=OVERLAPPING, structured_outputs=FORCED, max_tokens=3000)]),
        patience=8.0,
    ),
    "tokens: everything at once": Attack(
        lambda: iter(
            [
                completion(
                    prompt=["abc"] * 32,
                    stop=OVERLAPPING,
                    logprobs=20,
                    logit_bias={str(i): 1 for i in range(256)},
                    presence_penalty=1,
                    repetition_penalty=1.1,
                    min_tokens=200,
                    max_tokens=200,
                    stop_token_ids=[1, 2, 3],
                    top_p=0.9,
                    min_p=0.01,
                    stream=True,
                )
            ]
        ),
        patience=8.0,
    ),
    # Who goes first.
    "priority: before all others": Attack(
        lambda: iter([completion(prompt=["abc"] * 128, priority=-1000, max_tokens=200)] * 4), patience=8.0
    ),
    # The template's process.
    "template: crowd of long chats": Attack(
        lambda: iter([with_array("/v1/chat/completions", NOTHING_SAID, '{"role":"user","content":""}', 116_000)] * 60),
        patience=1.0,
        together=60,
    ),
    # Connections.
    "connections: pipelined requests": Attack(
        lambda: iter([b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100_000] * 50), patience=8.0, together=50
    ),
    "connections: pipelined behind a stream": Attack(
        lambda: iter(
            [
                completion(stream=True, max_tokens=2000).replace(b"connection: close\r\n", b"")
                + b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20_000
            ]
            * 8
        ),
        patience=5.0,
        together=8,
    ),
    "connections: bodies held open": Attack(
        lambda: iter([post("/v1/completions", b" " * (BODY - 1024), length=BODY)] * 400), patience=5.0, together=400
    ),
    "connections: nothing said": Attack(lambda: iter([b""] * 1000), patience=3.0, together=1000),
    "connections: heads without end": Attack(
        lambda: iter([b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5000] * 100), patience=3.0, together=100
    ),
}


async def one(port: int, payload: bytes, patience: float, ends: Counter[str]) -> None:
    """Sends `payload`, and reads until the server closes or the client's patience ends."""
    found = await exchange(port, payload, patience, FROM)
    if found.how == CLOSED:
        ends[str(found.status or CLOSED)] += 1
    else:
        ends[f"{found.how} after {found.status}" if found.status else found.how] += 1


async def launch(port: int, attack: Attack, payloads: Sequence[bytes]) -> Counter[str]:
    """What the clients got: statuses, and how many left or were cut off."""
    ends: Counter[str] = Counter()
    seats = asyncio.Semaphore(attack.together)

    async def client(payload: bytes) -> None:
        async with seats:
            await one(port, payload, attack.patience, ends)

    await asyncio.gather(*map(client, payloads))
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("name", choices=ATTACKS)
    chosen = parser.parse_args()
    attack = ATTACKS[chosen.name]
    payloads = list(attack.payloads())
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asyncio.run(launch(chosen.port, attack, payloads))), flush=True)


if __name__ == "__main__":
    main()
