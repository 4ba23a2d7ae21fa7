"""Two tenants: one that asks for one request at a time beside one that floods, and two that flood."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdh_batch.bench.strain import Watch
from bdh_batch.settings import load
from benchmarks import ROOT
from benchmarks.client import Response
from benchmarks.common import figure
from benchmarks.report import commit
from benchmarks.served import Served, served
from benchmarks.server.serving.common import (
    GREEDY,
    Figures,
    Window,
    percentile,
    print_scenario,
    refuse_unless,
    strained,
    text,
)

KEYS = ("key-of-a-flood", "key-of-one-at-a-time")


def jain(amounts: Sequence[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has all."""
    return sum(amounts) ** 2 / (len(amounts) * sum(amount**2 for amount in amounts))


async def keys(chosen: argparse.Namespace) -> Figures:
    """The figures of this checkout's server and, by turns, of that of another one."""
    by_running: list[Figures] = []
    other: list[Figures] = []
    for running in chosen.running:
        by_running.append(await tenants_of(ROOT, running, chosen))
        if chosen.against:
            other.append(await tenants_of(chosen.against.resolve(), running, chosen))
    queue = load().settings.scheduler.max_queued_requests
    figures = {"flood": chosen.flood, "max_queued_requests": queue, "options": chosen.set, "by_max_running": by_running}
    return figures | ({"against": {"commit": commit(chosen.against), "by_max_running": other}} if other else {})


async def tenants_of(root: Path, running: int, chosen: argparse.Namespace) -> Figures:
    options = [f"scheduler.max_running={running}", "auth.enabled=true", f"auth.api_keys={','.join(KEYS)}"]
    with served(*options, *chosen.set, root=root) as server:
        async with Watch() as watch:
            found = {**await beside_a_flood(server, chosen), **await two_floods(server, chosen)}
    found = {"max_running": running, **found, "client": strained(watch)}
    print_scenario(f"max_running {running}" if root == ROOT else f"max_running {running}, {root.name}", found)
    return found


async def beside_a_flood(server: Served, chosen: argparse.Namespace) -> Figures:
    """One at a time alone, then beside a flood, with other prompts, as the first ones' prefixes are cached."""
    draw = random.Random(2)
    alone: list[list[Response]] = []
    beside: list[list[Response]] = []
    for _ in range(chosen.rounds_of_keys + 1):
        alone.append([await server.ask(key=KEYS[1], **single(draw, chosen)) for _ in range(chosen.singles)])
        flood = asyncio.gather(*[server.ask(key=KEYS[0], **body) for body in flooding(draw, chosen)])
        await asyncio.sleep(0.5)
        bodies = [single(draw, chosen) for _ in range(chosen.singles)]
        found = [await server.ask(key=KEYS[1], **body) for body in bodies if not flood.done()]
        over = sorted(response.times[-1] for response in await flood)[-chosen.still]
        beside.append(
            [response for response in found if response.times[0] < over]
        )  # later ones met what was left of it
        again = [await server.ask(key=KEYS[1], **body) for body, _ in zip(bodies, found)]
        same = all(a.tokens == b.tokens for a, b in zip(again, found, strict=True))
        refuse_unless(same, "A text beside a flood differs from the same alone")
        refuse_unless(not any(a.cached_tokens for a in [*alone[-1], *found]), "A prompt was partly cached")
    ones, others = ([response.first for row in run[1:] for response in row] for run in (alone, beside))
    return {
        "alone_seconds": statistics.median(ones),
        "beside_seconds": statistics.median(others),
        "ratio": statistics.median(others) / statistics.median(ones),
        "beside_p90_seconds": percentile(others, 0.9),
        "requests_beside": [len(row) for row in beside[1:]],
        "figure_alone": figure(median_ms(alone[1:]), "ms", "lower"),
        "figure": figure(median_ms(beside[1:]), "ms", "lower"),
    }


def median_ms(rounds: Sequence[Sequence[Response]]) -> list[float]:
    """To the first token, round by round."""
    return [1e3 * statistics.median(response.first for response in row) for row in rounds if row]


def single(draw: random.Random, chosen: argparse.Namespace) -> dict[str, Any]:
    return {"prompt": text(draw, chosen.single_tokens), "max_tokens": 8, **GREEDY}


def flooding(draw: random.Random, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"prompt": text(draw, draw.randrange(32, 96)), "max_tokens": draw.randrange(16, 64), "seed": 1}
        for _ in range(chosen.flood)
    ]


async def two_floods(server: Served, chosen: argparse.Namespace) -> Figures:
    """The first tenant's requests come first, and ask for longer completions; what counts is tokens while both have
    some."""
    draw = random.Random(3)
    floods = []
    for key, scale in zip(KEYS, (2, 1)):
        bodies = [{**body, "max_tokens": scale * body["max_tokens"]} for body in flooding(draw, chosen)]
        floods.append(asyncio.gather(*[server.ask(key=key, **body) for body in bodies]))
        await asyncio.sleep(0.3)
    responses = [await flood for flood in floods]
    begin = max(response.sent for flood in responses for response in flood)
    waiting = min(max(response.times[0] for response in flood) for flood in responses)
    unfinished = min(percentile([response.times[-1] for response in flood], 0.8) for flood in responses)
    by_window = {"waiting": (begin, waiting), "unfinished": (begin, unfinished)}
    return {f"both_{name}": shares(responses, window) for name, window in by_window.items()}


def shares(responses: Sequence[Sequence[Response]], window: Window) -> Figures:
    """What each flood was served in `window`: generated tokens, and the prompts whose first token came in it."""
    begin, end = window
    generated = [sum(begin < at <= end for response in flood for at in response.times) for flood in responses]
    prompts = [sum(len(a.prompt) for a in flood if begin < a.times[0] <= end) for flood in responses]
    tokens = [a + b for a, b in zip(generated, prompts, strict=True)]
    return {"seconds": end - begin, "jain": jain(tokens), "generated": generated, "prompts": prompts}
