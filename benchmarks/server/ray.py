"""The server on a cluster of Ray: what a token costs more than in one process, what a lost engine costs, and routing.

    python -m benchmarks.server.ray             # about ten minutes
    python -m benchmarks.server.ray --rounds 1 --chats 12

    overhead  tokens/s of so many streams of the bundled model, and microseconds of processor time of all processes of a
              server for a token: in one process, with an engine process, and on a cluster with one engine. They take
              turns. Ray's own processes count, too.
    pause     the longest time between two tokens of a stream, where an engine of two is killed; no token may be wrong
    routing   tokens of prompts that are computed, of chats of two turns that share system prompts: with one engine,
              with three, and with three that are chosen at random

Writes `ray.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.client import CHAT, Response
from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

SERVE, UP = ("bdh_batch", "serve"), ("bdh_batch", "ray", "up")
RANDOM = ("benchmarks.server.random_cluster",)
ONE, PROCESS, CLUSTER = "one process", "an engine process", "a cluster"
SYSTEMS = {ONE: (SERVE, ()), PROCESS: (SERVE, ("engine.replicas=1",)), CLUSTER: (UP, ())}
ROUTINGS = {"one engine": (UP, 1), "three engines": (UP, 3), "three engines at random": (RANDOM, 3)}
ONE_CORE = "engine.threads=1"
BEGUN = 8  # tokens of each stream, before an engine is killed
ENGINE = "bdh-batch:engine-0"  # in the names that Ray gives to processes
SYSTEM_PROMPTS, ROLE = 10, "You are the {}th of ten actors, and know your part: "
Figures = dict[str, Any]


def processes(server: Served) -> list[psutil.Process]:
    """All of a server."""
    own = psutil.Process(server.pid)
    return [own, *own.children(recursive=True)]


def processor_seconds(server: Served) -> float:
    found = 0.0
    for process in processes(server):
        times = process.cpu_times()
        found += times.user + times.system
    return found


async def streams(server: Served, count: int, tokens: int) -> list[Response]:
    """The responses of as many streams at once, each with a prompt and a seed of its own."""
    sent = [await server.send(prompt=f"Scene {number}.\n", max_tokens=tokens, seed=number) for number in range(count)]
    return list(await asyncio.gather(*(each.end() for each in sent)))


async def overhead(count: int, tokens: int, rounds: int) -> Figures:
    """One round more goes before those that count."""
    rates: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    costs: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(served(ONE_CORE, *options, module=module))
            for name, (module, options) in SYSTEMS.items()
        }
        for number in range(rounds + 1):
            for name, server in running.items():
                busy, begun = processor_seconds(server), time.perf_counter()
                got = sum(len(each.tokens) for each in await streams(server, count, tokens))
                seconds, used = time.perf_counter() - begun, processor_seconds(server) - busy
                if number:
                    rates[name].append(got / seconds)
                    costs[name].append(1e6 * used / got)
    return {
        "figures": {
            **{f"{name}: tokens/s": figure(each, "tokens/s", "higher") for name, each in rates.items()},
            **{f"{name}: cost of a token": figure(each, "µs", "lower") for name, each in costs.items()},
        },
        "tokens_ratio_to_one_process": {name: asdict(ratio(rates[name], rates[ONE])) for name in (PROCESS, CLUSTER)},
        "cost_ratio_to_one_process": {name: asdict(ratio(costs[name], costs[ONE])) for name in (PROCESS, CLUSTER)},
    }


def longest_gap(responses: Sequence[Response]) -> float:
    """Milliseconds between two tokens of one stream, at most."""
    return 1000 * max(later - one for each in responses for one, later in zip(each.times, each.times[1:]))


async def killed(server: Served, count: int, tokens: int) -> list[Response]:
    """As `streams`, where an engine is killed once all have begun. Returns when it has been replaced."""
    sent = [await server.send(prompt=f"Scene {number}.\n", max_tokens=tokens, seed=number) for number in range(count)]
    while any(each.pieces < BEGUN for each in sent):  # noqa: ASYNC110 - it waits for what other tasks read
        await asyncio.sleep(0.005)
    next(each for each in processes(server) if ENGINE in " ".join(each.cmdline())).kill()
    found = list(await asyncio.gather(*(each.end() for each in sent)))
    await ready(server, 2)
    return found


async def ready(server: Served, engines: int) -> None:
    """Waits until a front end knows so many engines that compute."""

    def found() -> int:
        return [each["state"] for each in json.loads(server.get("/server_info"))["engines"]].count("ready")

    while await asyncio.to_thread(found) < engines:  # noqa: ASYNC110 - it waits for processes
        await asyncio.sleep(0.2)


async def pause(count: int, tokens: int, rounds: int) -> Figures:
    undisturbed, disturbed, wrong = list[float](), list[float](), 0
    with served(ONE_CORE, "engine.replicas=2", module=UP) as server:
        await ready(server, 2)
        right = [each.tokens for each in await streams(server, count, tokens)]
        for _ in range(rounds):
            undisturbed.append(longest_gap(await streams(server, count, tokens)))
            found = await killed(server, count, tokens)
            disturbed.append(longest_gap(found))
            wrong += sum(each.tokens != whole for each, whole in zip(found, right, strict=True))
    return {
        "figures": {
            "longest pause, undisturbed": figure(undisturbed, "ms", "lower"),
            "longest pause, an engine killed": figure(disturbed, "ms", "lower"),
        },
        "wrong_streams": wrong,
    }


async def chats(server: Served, count: int, tokens: int, at_once: int) -> Figures:
    """Two turns of each chat. Returns the tokens of prompts, and those of them that no cached prefix had."""
    room, found = asyncio.Semaphore(at_once), {"prompt_tokens": 0, "computed_tokens": 0}

    async def chat(number: int) -> None:
        role = ROLE.format(number % SYSTEM_PROMPTS)
        messages = [{"role": "system", "content": role + "speak as you were taught. " * 16}]
        async with room:
            for turn in range(2):
                messages.append({"role": "user", "content": f"Chat {number}, turn {turn}: what do you say?"})
                body: dict[str, Any] = {"messages": messages, "max_tokens": tokens, "seed": number}
                response = await server.ask(CHAT, **body)
                found["prompt_tokens"] += len(response.prompt)
                found["computed_tokens"] += len(response.prompt) - response.cached_tokens
                messages.append({"role": "assistant", "content": bytes(response.tokens).decode(errors="replace")})

    await asyncio.gather(*(chat(number) for number in range(count)))
    return dict(found)


async def routing(count: int, tokens: int, at_once: int) -> Figures:
    found = {}
    for name, (module, engines) in ROUTINGS.items():
        with served(ONE_CORE, f"engine.replicas={engines}", module=module) as server:
            await ready(server, engines)
            found[name] = await chats(server, count, tokens, at_once)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    one = found["one engine"]["computed_tokens"]
    return {
        **found,
        "computed_ratio_to_one_engine": {name: each["computed_tokens"] / one for name, each in found.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200, help="of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chats", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=8, help="chats under way")
    parser.add_argument("--only", choices=["overhead", "pause", "routing"], action="append")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    report: Figures = report_head(["ray", "torch", "numba", "uvicorn", "uvloop", "msgspec"])
    measured = {
        "overhead": lambda: overhead(chosen.streams, chosen.tokens, chosen.rounds),
        "pause": lambda: pause(chosen.streams, chosen.tokens, chosen.rounds),
        "routing": lambda: routing(chosen.chats, 24, chosen.at_once),
    }
    for name in chosen.only or measured:
        report[name] = uvloop.run(measured[name]())
        print(f"{name}: {report[name]}", flush=True)
    write_report(chosen.out / "ray.json", report)
    if report.get("pause", {}).get("wrong_streams"):
        sys.exit("streams that were moved differ")


if __name__ == "__main__":
    main()
