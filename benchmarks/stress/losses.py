"""Engines are killed under load, again and again: is every completion what it would have been?

    python -m benchmarks.stress.losses                # 50 kills, some minutes
    python -m benchmarks.stress.losses --kills 5

A server of two engine processes has many streams at once, with every parameter among them. First undisturbed, for what
they should be. Then, while the same requests come again and again, an engine is killed at random moments (SIGKILL).
Reported are the completions that differ, those that failed, and the longest pause within each stream; at the end no
engine may have anything left. A request that comes while both engines are down is refused before it begins (503), and
sent again, as the official clients do: these are counted. Writes `losses.json`; exit code 1 if something was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import ROOT
from benchmarks.client import Choice, Response
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

TINY = ROOT / "tests" / "data" / "conformance" / "tiny"
NAMES = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 60}}, "required": ["name"]}
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 1.2, "top_p": 0.9},
    {"n": 2, "logprobs": 3, "presence_penalty": 0.5, "logit_bias": {"65": 2.0}},
    {"echo": True, "logprobs": 1},
    {"stop": ["no such text", "\u00e9\u00e8"], "frequency_penalty": 0.3, "min_p": 0.01},
    {"guided_json": NAMES, "logprobs": 0},
    {"min_tokens": 30, "stop_token_ids": [65, 66, 67], "repetition_penalty": 1.1},
    {"bad_words": ["a", "the"], "top_k": 40},
    {"temperature": 0},
]
PAUSES = (0.3, 3.0)  # seconds between two kills, at random
READY_SECONDS = 600.0
RETRY_SECONDS = 0.25  # after a refusal


@dataclass
class Tally:
    """What has become of the completions."""

    completions: int = 0
    differ: int = 0
    failed: int = 0
    refused: int = 0  # before they began, and sent again
    kills: int = 0
    pauses: list[float] = field(default_factory=list)  # seconds: the longest within each stream


def body(number: int, tokens: int) -> dict[str, Any]:
    return {
        "prompt": f"Scene {number}.\n",
        "max_tokens": tokens,
        "seed": number,
        **PARAMETERS[number % len(PARAMETERS)],
    }


Facts = tuple[dict[int, Choice], dict[str, int]]


def facts(response: Response) -> Facts:
    """What does not depend on which engines compute it: all but how many tokens were cached."""
    return response.choices, response.usage


async def complete(server: Served, number: int, tokens: int, tally: Tally) -> tuple[Facts | None, float]:
    """What a completion has, None where it failed, and its longest pause."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            response = await server.ask(**body(number, tokens))
            break
        except RuntimeError as error:
            if not str(error).startswith("status 503") or time.monotonic() > deadline:
                print(f"  request {number}: {error}", flush=True)
                return None, 0.0
            tally.refused += 1
            await asyncio.sleep(RETRY_SECONDS)
    times = [response.sent, *response.times]
    return facts(response), max(after - before for before, after in pairwise(times))


async def engines(server: Served) -> list[dict[str, Any]]:
    _, content = await server.whole("GET", "/server_info")
    found: list[dict[str, Any]] = json.loads(content).get("engines", [])
    return found


async def kill(server: Served, kills: int, tally: Tally, draw: random.Random) -> None:
    while tally.kills < kills:
        await asyncio.sleep(draw.uniform(*PAUSES))
        ready = [each for each in await engines(server) if each["state"] == "ready"]
        if ready:
            os.kill(draw.choice(ready)["pid"], signal.SIGKILL)
            tally.kills += 1


async def run(server: Served, chosen: argparse.Namespace) -> Tally:
    tally, draw = Tally(), random.Random(chosen.seed)

    async def all_of() -> list[tuple[Facts | None, float]]:
        return await asyncio.gather(
            *(complete(server, number, chosen.tokens, tally) for number in range(chosen.streams))
        )

    expected = [found for found, _ in await all_of()]
    if None in expected:
        sys.exit("a completion failed before anything was killed")
    killing = asyncio.create_task(kill(server, chosen.kills, tally, draw))
    while not killing.done():
        for number, (found, pause) in enumerate(await all_of()):
            tally.completions += 1
            tally.failed += found is None
            tally.differ += found is not None and found != expected[number]
            tally.pauses.append(pause)
        print(
            f"  {tally.kills} kills, {tally.completions} completions, {tally.differ} differ, {tally.failed} failed",
            flush=True,
        )
    await killing
    deadline = time.monotonic() + READY_SECONDS
    while [each["state"] for each in await engines(server)] != ["ready", "ready"]:
        if time.monotonic() > deadline:
            sys.exit("the engines did not come back")
        await asyncio.sleep(0.1)
    return tally


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.stress.losses",
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=64, help="at once")
    parser.add_argument("--tokens", type=int, default=200, help="of a completion, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    head = report_head(["torch", "numba", "uvloop", "msgspec"])
    with served(f"model.path={TINY}", "engine.replicas=2", "engine.threads=1") as server:
        tally = uvloop.run(run(server, chosen))
        left = server.metric("bdh_num_requests_running") + server.metric("bdh_num_requests_waiting")
    pauses = sorted(tally.pauses)
    report = {
        **head,
        "asked": {"kills": chosen.kills, "streams": chosen.streams, "tokens": chosen.tokens, "seed": chosen.seed},
        "kills": tally.kills,
        "completions": tally.completions,
        "differ": tally.differ,
        "failed": tally.failed,
        "refused": tally.refused,
        "left_running": left,
        "longest_pause_s": {
            "median": pauses[len(pauses) // 2],
            "p99": pauses[int(0.99 * len(pauses))],
            "most": pauses[-1],
        },
    }
    write_report(chosen.out / "losses.json", report)
    print(
        json.dumps(
            {name: report[name] for name in ("kills", "completions", "differ", "failed", "refused", "longest_pause_s")}
        )
    )
    sys.exit(1 if tally.differ or tally.failed or left else 0)


if __name__ == "__main__":
    main()
