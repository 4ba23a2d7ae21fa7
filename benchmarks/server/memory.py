"""The first minutes of a server, and the memory that it ends with: cold against warm, and against another checkout.

    python -m benchmarks.server.memory                               # a few minutes
    python -m benchmarks.server.memory --before ../bdh_batch-before  # the same of the server in that checkout, by turns

A server with default options and the bundled model is asked by many clients at once from its first moment on, each of
which sends its next request when it has its response. Responses come whole, so that the clients cost little. Cold is
until the first `--requests` are answered, warm is the time until as many more are. Beside tokens/s there are tokens for
each second of the server's CPU time, which other work on the machine disturbs less. Then the server is left alone, and
after `--idle` seconds (`engine.idle_release_seconds` is half of them) its memory is looked at again.

On a server of its own, chats share a system prompt: the share of their prompts' tokens that were cached.

On a virtual machine, memory that its host has to find first costs six times as much to touch as any later, whoever
touches it. So before each server another process takes `--machine` of memory and ends; how long its first touch took,
and a second, is in the report.

Writes `memory.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import ROOT
from benchmarks.client import CHAT, COMPLETIONS, Response
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served
from benchmarks.server.serving.common import text

Figures = dict[str, Any]
PAGE = mmap.PAGESIZE


def resident(pid: int) -> int:
    """Bytes of main memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


class Crowd:
    """Clients that keep a connection each, and ask until so many requests are answered.

    Args:
        watch: what is noted when a mark is reached.
    """

    def __init__(self, server: Served, marks: Sequence[int], prompt: int, tokens: int) -> None:
        self._server = server
        self._marks = marks
        self._prompt, self._tokens = prompt, tokens
        self._draw = random.Random(0)
        self.answered = 0
        self.notes: list[tuple[float, float, float]] = []

    def note(self) -> None:
        """Counts the tokens of unfinished responses, too: the first phase alone begins with none of those."""
        generated = self._server.metric("bdh_generation_tokens_total")
        self.notes.append((time.perf_counter(), cpu_seconds(self._server.pid), generated))

    async def run(self, clients: int) -> None:
        self.note()
        tasks = [asyncio.create_task(self._client()) for _ in range(clients)]
        while len(self.notes) <= len(self._marks):
            await asyncio.sleep(0.02)
            for task in tasks:
                if task.done():
                    task.result()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._server.close()

    async def _client(self) -> None:
        while True:
            body = {"prompt": text(self._draw, self._prompt), "max_tokens": self._tokens}
            await self._server.post(COMPLETIONS, body)
            self.answered += 1
            if self.answered in self._marks:
                self.note()


async def first_minutes(server: Served, chosen: argparse.Namespace) -> Figures:
    before = resident(server.pid)
    crowd = Crowd(server, [chosen.requests, 2 * chosen.requests], chosen.prompt, chosen.tokens)
    await crowd.run(chosen.clients)
    after = resident(server.pid)
    phases = {}
    for name, (begin, end) in zip(("cold", "warm"), zip(crowd.notes, crowd.notes[1:])):
        tokens = end[2] - begin[2]
        phases[name] = {"tokens_per_s": tokens / (end[0] - begin[0]), "per_cpu_s": tokens / (end[1] - begin[1])}
    await asyncio.sleep(chosen.idle)
    return {
        **phases,
        "cold_to_warm": phases["cold"]["tokens_per_s"] / phases["warm"]["tokens_per_s"],
        "cold_to_warm_per_cpu_s": phases["cold"]["per_cpu_s"] / phases["warm"]["per_cpu_s"],
        "memory_gb": {"started": before / 1e9, "after_load": after / 1e9, "after_idle": resident(server.pid) / 1e9},
    }


async def shared_prompt(server: Served, chosen: argparse.Namespace) -> Figures:
    draw = random.Random(1)
    system = {"role": "system", "content": text(draw, chosen.system)}
    responses: list[Response] = []
    for _ in range(0, chosen.chats, chosen.together):
        users = [{"role": "user", "content": text(draw, 40)} for _ in range(chosen.together)]
        some = [server.ask(CHAT, messages=[system, user], max_tokens=8, temperature=0.0) for user in users]
        responses += await asyncio.gather(*some)
    prompts, cached = sum(len(each.prompt) for each in responses), sum(each.cached_tokens for each in responses)
    return {
        "prompt_tokens": prompts,
        "cached_tokens": cached,
        "cached_share": cached / prompts,
        "memory_gb": resident(server.pid) / 1e9,
    }


TOUCH = """
import mmap, sys, time
for _ in range(2):
    begin = time.perf_counter()
    memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(memory), mmap.PAGESIZE):
        memory[page] = 1
    print(time.perf_counter() - begin)
    memory.close()
"""


def touch(size: int) -> list[float]:
    """Seconds that a process of its own takes to touch `size` bytes that are new to it: first, and once more."""
    done = subprocess.run([sys.executable, "-c", TOUCH, str(size)], check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


def measure(root: Path, options: Sequence[str], scenario: Callable[..., Any], chosen: argparse.Namespace) -> Figures:
    touched = touch(chosen.machine)
    with served(*options, root=root) as server:
        found: Figures = uvloop.run(scenario(server, chosen))
    return {**found, "machine_touch_s": touched}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.server.memory",
    )
    parser.add_argument("--before", type=Path, help="a checkout with the server to compare with")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=600, help="that are cold, and as many that are warm")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds")
    parser.add_argument("--chats", type=int, default=100)
    parser.add_argument("--system", type=int, default=1024, help="tokens of the system prompt in common")
    parser.add_argument("--together", type=int, default=10, help="chats sent at once")
    parser.add_argument("--machine", type=int, default=4 * 10**9, help="bytes that the machine has to have ready")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of the servers")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    head = report_head(["torch", "numba", "uvicorn", "uvloop"])
    idle = [f"engine.idle_release_seconds={chosen.idle / 2}"]
    variants = {"now": (ROOT, [*chosen.set, *idle])}
    if chosen.before is not None:
        variants = {"before": (chosen.before.resolve(), chosen.set), **variants}
    report: Figures = {name: {"first_minutes": [], "shared_prompt": []} for name in variants}
    for _ in range(chosen.rounds):
        for name, (root, options) in variants.items():
            for scenario in (first_minutes, shared_prompt):
                found = measure(root, options, scenario, chosen)
                report[name][scenario.__name__].append(found)
                print(f"{name}, {scenario.__name__}: {json.dumps(found)}", flush=True)
    asked = {
        name: getattr(chosen, name) for name in ("clients", "requests", "prompt", "tokens", "idle", "system", "machine")
    }
    write_report(chosen.out / "memory.json", {**head, "asked": asked, **report})


if __name__ == "__main__":
    main()
