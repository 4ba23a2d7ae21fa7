"""Clients for the soak, good ones and bad ones, each with the ends that its requests may come to.

They read late, little or never, and leave without farewell, over sockets of their own (`raw.py`).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.raw import Call

PATIENCE = 300.0  # seconds without a byte, of a server that has work for a few: it hangs, or its machine does
STEM = "All the world's a stage, and all the men and women merely players: " * 4
FINISHED = re.compile(rb'"finish_reason":"(?:stop|length)"')
DONE, LEFT = "done", "left"

Body = dict[str, Any]


@dataclass
class Target:
    """
    Args:
        keys: API keys, of which each request carries one; none where the server asks for none.
        wordy: a name of the model so long that few tokens fill a socket's buffers; None where it has none.
    """

    host: str
    port: int
    keys: tuple[str, ...] = ()
    wordy: str | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)  # the load ends: nobody waits any longer


def end_of(call: Call, responses: int) -> str:
    """What the response has come to. DONE has all that was asked for; a refusal and an error event say which."""
    if not call.whole:
        return "cut"
    if call.status != 200:
        return f"{call.status} {error_name(bytes(call.body))}"
    streamed = call.body.startswith(b"data: ")
    last = call.body[:-2].rpartition(b"\n\n")[2] if streamed else call.body
    if streamed and last.startswith(b'data: {"error"'):
        return f"event {error_name(bytes(last[6:]))}"
    if streamed and last != b"data: [DONE]":
        return "no end"
    return DONE if len(FINISHED.findall(call.body)) == responses else "incomplete"


def error_name(raw: bytes) -> str:
    """The code of an error's body, or its message where it has none."""
    try:
        error = json.loads(raw)["error"]
        return str(error["code"] or error["message"])
    except (ValueError, KeyError, TypeError):
        return f"that is no error body: {raw[:80]!r}"


Habit = Callable[[Target, random.Random, Call], Awaitable[str]]


def make_body(draw: random.Random, **more: object) -> Body:
    """What to ask for: many prompts begin alike."""
    text = STEM[: draw.randrange(1, len(STEM))] + str(draw.randrange(100))
    body: Body = {
        "prompt": draw.choice((text, list(text.encode()))),
        "max_tokens": draw.choice((1, 8, 64)),
        "n": draw.choice((1, 1, 1, 3)),
        "priority": draw.choice((0, 0, 0, 1, 2)),
        "temperature": draw.choice((0, 1)),
        "stream": True,
    }
    return body | more


def headers_of(target: Target, draw: random.Random) -> dict[str, str]:
    return {"authorization": f"Bearer {draw.choice(target.keys)}"} if target.keys else {}


async def ask(call: Call, target: Target, draw: random.Random, body: Body, **headers: str) -> None:
    await call.open(target.host, target.port)
    call.gives_way = target.over if body.get("priority", 0) > 0 else None
    content = json.dumps(body).encode()
    given = headers_of(target, draw) | {name.replace("_", "-"): text for name, text in headers.items()}
    await call.send(call.request("POST", "/v1/completions", content, given))


async def read_response(call: Call, body: Body) -> str:
    """Reads to the end."""
    while not call.over:
        await call.read()
    return end_of(call, body["n"])


async def pause(target: Target, seconds: float) -> None:
    """Or until the load is over."""
    try:
        async with asyncio.timeout(seconds):
            await target.over.wait()
    except TimeoutError:
        return


def leave(call: Call, draw: random.Random) -> str:
    call.close(reset=draw.random() < 0.5)
    return LEFT


async def stays(target: Target, draw: random.Random, call: Call) -> str:
    body = make_body(draw)
    await ask(call, target, draw, body)
    return await read_response(call, body)


async def takes_it_whole(target: Target, draw: random.Random, call: Call) -> str:
    body = make_body(draw, stream=False)
    await ask(call, target, draw, body)
    return await read_response(call, body)


async def leaves_in_the_request(target: Target, draw: random.Random, call: Call) -> str:
    raw = call.request("POST", "/v1/completions", json.dumps(make_body(draw)).encode(), headers_of(target, draw))
    await call.open(target.host, target.port)
    await call.send(raw[: draw.randrange(len(raw))])
    await pause(target, draw.choice((0.0, 0.05)))
    return leave(call, draw)


async def leaves_before_the_response(target: Target, draw: random.Random, call: Call) -> str:
    await ask(call, target, draw, make_body(draw, stream=draw.random() < 0.5))
    await pause(target, draw.uniform(0, 0.1))
    return leave(call, draw)


async def leaves_in_the_middle(target: Target, draw: random.Random, call: Call) -> str:
    body = make_body(draw, max_tokens=1000)
    enough = draw.randrange(1, 4000)
    await ask(call, target, draw, body)
    while not call.over:
        await call.read()
        if len(call.body) > enough:
            return leave(call, draw)
    return end_of(call, body["n"])


async def reads_slowly(target: Target, draw: random.Random, call: Call) -> str:
    """A few bytes a second; after a while it wants the rest, which must all be there."""
    body = make_body(draw, max_tokens=64)
    await ask(call, target, draw, body)
    for _ in range(draw.randrange(100)):
        if call.over or target.over.is_set():
            break
        await call.read(16)
        await pause(target, 0.1)
    return await read_response(call, body)


async def never_reads(target: Target, draw: random.Random, call: Call, seconds: float | None = None) -> str:
    """Its response is longer than all buffers on the way."""
    body = make_body(draw, max_tokens=400, n=3)
    await ask(call, target, draw, body | ({"model": target.wordy} if target.wordy else {}))
    await pause(target, draw.uniform(1, 20) if seconds is None else seconds)
    return leave(call, draw)


async def wakes_up(target: Target, draw: random.Random, call: Call) -> str:
    """Does not read for long, and must then find all of its response."""
    body = make_body(draw, max_tokens=400, n=3)
    await ask(call, target, draw, body | ({"model": target.wordy} if target.wordy else {}))
    await pause(target, draw.uniform(1, 10))
    return await read_response(call, body)


async def has_no_time(target: Target, draw: random.Random, call: Call) -> str:
    body = make_body(draw, stream=draw.random() < 0.5, max_tokens=200)
    await ask(call, target, draw, body, x_request_timeout=str(draw.choice((0.001, 0.05, 0.3))))
    return await read_response(call, body)


async def talks_nonsense(target: Target, draw: random.Random, call: Call) -> str:
    """And must get the right status."""
    method, path, content, length, status = draw.choice(NONSENSE)
    raw = call.request(method, path, content, headers_of(target, draw))
    await call.open(target.host, target.port)
    await call.send(raw if length is None else raw.replace(b"content-length: 0", b"content-length: %d" % length))
    while not call.over:
        await call.read()
    return "refused" if call.whole and call.status == status else f"{call.status}, not {status}"


# method, path, content, the length that it claims to have if not its own, and the status of the response
NONSENSE: tuple[tuple[str, str, bytes, int | None, int], ...] = (
    ("POST", "/v1/completions", b'{"prompt": ""}', None, 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "priority": 1000000}', None, 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "n": 0}', None, 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": "5"}', None, 400),
    ("POST", "/v1/completions", b'{"prompt": [1, 2, -3]}', None, 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "model": "none"}', None, 404),
    ("POST", "/v1/completions", b'{"prompt": "a", "temperature', None, 400),
    ("POST", "/v1/completions", b"\x00\xff\xfe", None, 400),
    ("POST", "/v1/completions", b"", 2**40, 413),
    ("POST", "/v1/chat/completions", b'{"messages": []}', None, 400),
    ("DELETE", "/v1/completions", b"", None, 405),
    ("GET", "/v1/nothing", b"", None, 404),
)


async def converses(target: Target, draw: random.Random, call: Call) -> str:
    """Three turns; each prompt is all that was said before."""
    said: list[int] = list(STEM[: draw.randrange(1, len(STEM))].encode())
    for turn in range(3):
        body = make_body(draw, prompt=said, n=1, stream=False, return_token_ids=True)
        call = call if turn == 0 else Call(PATIENCE)
        try:
            await ask(call, target, draw, body)
            if (end := await read_response(call, body)) != DONE:
                return end
        finally:
            call.close()
        said = [*said, *json.loads(call.body)["choices"][0]["token_ids"], *b"\nAnd then?\n"]
    return DONE


async def asks_little(target: Target, draw: random.Random, call: Call) -> str:
    body: Body = {"prompt": "a", "max_tokens": 1, "n": 1}
    await ask(call, target, draw, body)
    return await read_response(call, body)


async def holds_on(target: Target, draw: random.Random, call: Call) -> str:
    """Keeps a slot until the load is over, or somebody fails."""
    await ask(call, target, draw, make_body(draw, max_tokens=10**5, n=1, priority=0))
    while not (call.over or target.over.is_set()):
        await call.read()
    return leave(call, draw)


@dataclass(frozen=True)
class Kind:
    """
    Args:
        weight: how many of a crowd are of this kind.
        disconnects: the same where the crowd is to leave.
        ends: those that are right for it, beside being refused as one too many.
    """

    habit: Habit
    weight: float
    disconnects: float = 0.0
    ends: frozenset[str] = frozenset({DONE})


LEAVES = frozenset({DONE, LEFT})
OUT_OF_TIME = frozenset(
    {DONE, "408 queue_timeout", "504 request_timeout", "event queue_timeout", "event request_timeout"}
)
KINDS: dict[str, Kind] = {
    "stays": Kind(stays, 20, 1),
    "takes it whole": Kind(takes_it_whole, 8),
    "leaves in the request": Kind(leaves_in_the_request, 4, 4, LEAVES),
    "leaves before the answer": Kind(leaves_before_the_response, 8, 12, LEAVES),
    "leaves in the middle": Kind(leaves_in_the_middle, 8, 8, LEAVES),
    "reads slowly": Kind(reads_slowly, 3),
    "never reads": Kind(never_reads, 1, 0, LEAVES),
    "wakes up": Kind(wakes_up, 1),
    "has no time": Kind(has_no_time, 6, 0, OUT_OF_TIME),
    "talks nonsense": Kind(talks_nonsense, 6, 0, frozenset({"refused"})),
    "converses": Kind(converses, 5),
}
REFUSED = "429 queue_full"


async def meet(habit: Habit, target: Target, draw: random.Random) -> str:
    """One client: the end that its request came to."""
    call = Call(PATIENCE, little=draw.random() < 0.5)
    try:
        return await habit(target, draw, call)
    except TimeoutError:
        return f"hung after {len(call.body)} bytes"
    except ConnectionRefusedError:
        return "nobody there"
    except ConnectionError:
        return "reset"
    finally:
        call.close()
