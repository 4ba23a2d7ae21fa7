"""Sends random requests to a server for an hour, and looks for crashes, hangs and growth.

    python -m benchmarks.stress.fuzz                    # an hour; --seconds 60 for less
    python -m benchmarks.stress.fuzz --cases 4711-4712  # the same requests again, by their numbers

`fuzzed.py` makes them. The server is started for it, with a chat template in its sandbox. Ends with exit code 1
where it died, a response was an internal error or did not come, /health took too long, memory went on growing, or the
log has a traceback; the numbers of the requests that were under way are printed."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import psutil
from tqdm import tqdm

from benchmarks.raw import status_of
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served
from benchmarks.stress.fuzzed import request
from benchmarks.stress.hostile import HEALTH, STATES, TEMPLATE, log_faults
from benchmarks.stress.payloads import post

TOGETHER = 4  # requests at a time
HANGS = 60.0  # seconds
LONGEST_HEALTH = 1.0  # seconds, beside requests of all kinds on the same cores
GROWTH = 64 * 2**20  # bytes from the second quarter of the time to the last that are no leak


class Fuzz:
    """Requests under way, and what came of them."""

    def __init__(self, server: Served, cases: Iterator[int], seconds: float, longest_health: float) -> None:
        self._server = server
        self._process = psutil.Process(server.pid)
        self._cases = cases
        self._until = time.monotonic() + seconds
        self._under_way: set[int] = set()
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []
        self.rss: list[int] = []
        self.longest_health = 0.0
        self._may_take = longest_health
        self._over = False
        self.slowest = (0.0, 0)  # seconds, and the case that took them

    async def run(self, bar: tqdm[Any]) -> None:
        watch = asyncio.create_task(self._watch(bar))
        await asyncio.gather(*(self._client() for _ in range(TOGETHER)))
        self._over = True
        await watch

    async def _client(self) -> None:
        for case in self._cases:
            if time.monotonic() > self._until or len(self.faults) > 20:
                return
            await self._send(case)

    async def _send(self, case: int) -> None:
        path, body = request(case)
        self._under_way.add(case)
        began = time.monotonic()
        # Not orjson: it writes no integer beyond 64 bits.
        status = await status_of(self._server.port, post(path, json.dumps(body).encode()), HANGS)
        self.slowest = max(self.slowest, (time.monotonic() - began, case))
        self.statuses[status] += 1
        if status in (0, 500):
            self.faults.append(f"case {case}: {status or 'no response'}; under way: {sorted(self._under_way)}")
        self._under_way.discard(case)

    async def _watch(self, bar: tqdm[Any]) -> None:
        while self._process.is_running() and not self._over:
            began = time.monotonic()
            await status_of(self._server.port, HEALTH)
            took = time.monotonic() - began
            self.longest_health = max(self.longest_health, took)
            if took > self._may_take:
                self.faults.append(f"/health took {took:.2f} s; under way: {sorted(self._under_way)}")
            self.rss.append(self._process.memory_info().rss)
            bar.set_postfix_str(
                f"{self.statuses.total()} requests, {len(self.faults)} faults, {self.rss[-1] >> 20} MiB"
            )
            await asyncio.sleep(0.2)

    def report(self) -> dict[str, Any]:
        quarter = max(1, len(self.rss) // 4)
        second, last = (
            statistics.median(part or [0]) for part in (self.rss[quarter : 2 * quarter], self.rss[-quarter:])
        )
        if last > second + GROWTH:
            self.faults.append(f"memory grew from {int(second) >> 20} to {int(last) >> 20} MiB")
        return {
            "requests": self.statuses.total(),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "longest_health_ms": round(self.longest_health * 1000, 1),
            "slowest": {"seconds": round(self.slowest[0], 2), "case": self.slowest[1]},
            "mib": {"first": self.rss[0] >> 20, "most": max(self.rss) >> 20, "last": self.rss[-1] >> 20},
            "faults": self.faults,
        }


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    first, _, last = chosen.cases.partition("-")
    cases = iter(range(int(first), int(last) + 1 if last else 2**62))
    with tempfile.TemporaryDirectory() as folder:
        template, log = Path(folder, "template.jinja"), Path(folder, "log")
        template.write_text(TEMPLATE)
        with served(*STATES, f"chat.template={template}", *chosen.set, log=log) as server, tqdm(file=sys.stderr) as bar:
            fuzz = Fuzz(server, cases, chosen.seconds, chosen.health)
            asyncio.run(fuzz.run(bar))
            report = fuzz.report()
        report["faults"] += log_faults(log)
        assert server.process is not None
        if server.process.returncode:
            report["faults"].append(f"the server's exit code is {server.process.returncode}")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--cases", default="0", metavar="FIRST[-LAST]", help="numbers of requests")
    parser.add_argument("--health", type=float, default=LONGEST_HEALTH, help="seconds that /health may take")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="of the server")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    head = report_head(("torch", "llguidance", "uvicorn"))
    report = run(chosen)
    write_report(chosen.out / "fuzz.json", head | report)
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
