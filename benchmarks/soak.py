"""Keeps a running server busy with clients that stay, leave, time out and send nonsense; in the end it must be at rest.

    python -m benchmarks.soak --url http://127.0.0.1:8000 --requests 10000 --seconds 1200

Ends with exit code 1 if the server made an error of its own, or if at rest anything still runs, waits or is suspended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter

import httpx
from prometheus_client.parser import text_string_to_metric_families

REST_SECONDS = 30.0
STEM = "All the world's a stage, and all the men and women merely players: " * 4
NONSENSE: tuple[dict[str, object], ...] = ({"prompt": ""}, {"prompt": "a", "priority": 10**6}, {"prompt": "a", "n": 0})


async def one(client: httpx.AsyncClient, draw: random.Random, ends: Counter[str]) -> None:
    """One client, and how it fared: a status, or that it left."""
    body: dict[str, object] = {
        "prompt": STEM[: draw.randrange(1, len(STEM))] + str(draw.randrange(100)),
        "max_tokens": draw.choice((1, 8, 64)),
        "n": draw.choice((1, 1, 1, 3)),
        "priority": draw.choice((0, 0, 0, 1, -1)),
        "stream": True,
    }
    kind, headers = draw.choices(("stay", "leave", "time out", "nonsense"), (6, 3, 1, 1))[0], {}
    if kind == "nonsense":
        body = dict(draw.choice(NONSENSE))
    elif kind == "time out":
        headers = {"x-request-timeout": str(draw.choice((0.01, 0.1)))}
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            read = 0
            async for chunk in answer.aiter_raw():
                read += len(chunk)
                if kind == "leave" and read > draw.randrange(3000):
                    ends["left"] += 1
                    return
            ends[str(answer.status_code)] += 1
    except httpx.TransportError as error:
        ends[type(error).__name__] += 1


async def soak(
    url: str, requests: int, seconds: float, clients: int, seed: int
) -> tuple[Counter[str], dict[str, float]]:
    draw, ends, deadline = random.Random(seed), Counter[str](), time.monotonic() + seconds
    left = iter(range(requests))

    async def work(client: httpx.AsyncClient) -> None:
        for _ in left:
            if time.monotonic() > deadline:
                return
            await one(client, draw, ends)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(clients)))
        until = time.monotonic() + REST_SECONDS
        while any((rest := await at_rest(client)).values()) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return ends, rest


async def at_rest(client: httpx.AsyncClient) -> dict[str, float]:
    """What should be zero when nobody asks for anything."""
    names = {f"bdh_num_requests_{state}" for state in ("running", "waiting", "swapped")} | {
        "bdh_state_slots_usage_perc"
    }
    text = (await client.get("/metrics")).text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in names
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1200.0, help="begin no request after so long")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    ends, rest = asyncio.run(soak(chosen.url, chosen.requests, chosen.seconds, chosen.clients, chosen.seed))
    print(json.dumps({"ends": ends, "at_rest": rest}))
    faults = any(rest.values()) or any(end not in {"200", "400", "408", "429", "504", "left"} for end in ends)
    return int(faults)


if __name__ == "__main__":
    sys.exit(main())
