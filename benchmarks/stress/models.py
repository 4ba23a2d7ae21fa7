"""A model is loaded on demand and unloaded, again and again: what grows, and does another model's load notice?

    python -m benchmarks.stress.models                # 100 times, some minutes
    python -m benchmarks.stress.models --times 5

A server has two models of different vocabularies. One has streams all the time. The other one is loaded by a request,
which has to have the tokens that it had the first time, and is unloaded by an operator. After each time, memory (the
proportional set size, PSS, of the supervisor, its front end and all that these started, but for engines) and open files
are counted. Writes `models.json`; exit code 1 if a response was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks import ROOT
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served
from benchmarks.stress.losses import Tally, complete

CONFORMANCE = ROOT / "tests" / "data" / "conformance"
MODELS = (
    f"models=[{{id: tiny, path: {CONFORMANCE / 'tiny'}}}, "
    f"{{id: odd, path: {CONFORMANCE / 'odd-sizes'}, load: on_demand, keep_alive: 600}}]"
)
ODD: dict[str, Any] = {"model": "odd", "prompt": [1, 2, 3], "max_tokens": 32, "seed": 1}
TOKENS = 200
WARM_UP = 10  # times until allocators and caches have what they need


def processes(server: Served) -> list[psutil.Process]:
    """The supervisor, its front end and all that these started, but for engines."""
    supervisor = psutil.Process(server.pid)
    ours = [child for child in supervisor.children() if not any("engine-" in word for word in child.cmdline())]
    return [supervisor, *(each for child in ours for each in (child, *child.children(recursive=True)))]


def sample(server: Served) -> dict[str, int]:
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # one has ended meanwhile
            found = processes(server)
            return {
                "pss": sum(each.memory_full_info().pss for each in found),
                "files": sum(each.num_fds() for each in found),
                "processes": len(found),
            }


async def load_again_and_again(server: Served, times: int) -> tuple[list[dict[str, int]], list[float], int]:
    """What was counted after each time, the seconds that a first request took, and how many were wrong."""
    samples, seconds, wrong = [], [], 0
    expected = (await server.ask(**ODD)).tokens
    for number in range(times):
        status, content = await server.whole("POST", "/models/unload", {"model": "odd"})
        if status != 200:
            sys.exit(f"the model is not unloaded: {content.decode()}")
        samples.append(sample(server))
        began = time.perf_counter()
        wrong += (await server.ask(**ODD)).tokens != expected
        seconds.append(time.perf_counter() - began)
        if number % 10 == 9:
            print(f"  {number + 1} times, {samples[-1]}, {wrong} wrong", flush=True)
    return samples, seconds, wrong


async def run(server: Served, chosen: argparse.Namespace) -> dict[str, Any]:
    numbers = range(chosen.streams)
    tally = Tally()
    expected = await asyncio.gather(*(complete(server, number, TOKENS, tally) for number in numbers))
    done = asyncio.Event()
    completions = differ = 0

    async def steady() -> None:
        nonlocal completions, differ
        while not done.is_set():
            found = await asyncio.gather(*(complete(server, number, TOKENS, tally) for number in numbers))
            completions += len(found)
            differ += sum(tokens != before for (tokens, _), (before, _) in zip(found, expected, strict=True))

    beside = asyncio.create_task(steady())
    samples, seconds, wrong = await load_again_and_again(server, chosen.times)
    done.set()
    await beside
    differ += tally.refused  # no engine was lost
    settled = samples[min(WARM_UP, len(samples) // 2) :]
    third = max(1, len(settled) // 3)
    growth = {
        name: statistics.median(each[name] for each in settled[-third:])
        - statistics.median(each[name] for each in settled[:third])
        for name in ("pss", "files", "processes")
    }
    return {
        "times": len(samples),
        "wrong": wrong,
        "beside": {"completions": completions, "differ": differ},
        "first_request_s": {"median": statistics.median(seconds), "most": max(seconds)},
        "growth": growth,
        "per_time_bytes": growth["pss"] / (len(settled) * 2 / 3),
        "samples": samples[:: max(1, len(samples) // 20)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.stress.models",
    )
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--streams", type=int, default=8, help="of the other model, at once")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    head = report_head(["torch", "numba", "uvloop", "msgspec"])
    with served(MODELS) as server:
        found = uvloop.run(run(server, chosen))
    write_report(chosen.out / "models.json", {**head, "streams": chosen.streams, **found})
    print(json.dumps({name: value for name, value in found.items() if name != "samples"}))
    sys.exit(1 if found["wrong"] or found["beside"]["differ"] else 0)


if __name__ == "__main__":
    main()
