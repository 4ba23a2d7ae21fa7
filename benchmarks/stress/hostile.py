"""Attacks a server, one hostile input after another, and watches what that does to everyone else.

    python -m benchmarks.stress.hostile                    # all attacks, about ten minutes
    python -m benchmarks.stress.hostile grammar compiler   # those whose names begin so
    python -m benchmarks.stress.hostile --rounds 5 errors  # medians of five rounds each

The server runs with its default limits and serves 8 quiet streams. Attackers send from an address of their own, in a
process of their own. While they do, another client asks for /health 20 times a second, and now and then for a chat and
for structured output. Per attack the report has what the attackers got, the longest /health, the longest gap
of the quiet streams beside the longest without an attack, the memory of the server and of its child processes before,
at most and after, and what the other client waited. At the end the server gets SIGTERM in the midst of an attack.

Ends with exit code 1, and says why, where the server died, a quiet stream or another client's request failed, an
attacker got an internal error, memory did not come back, the log has a traceback, /health took longer than it
may, or SIGTERM did not end the server in time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
from tqdm import tqdm

from benchmarks import ROOT
from benchmarks.raw import LOST_SECONDS, Raw, request, status_of
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served
from benchmarks.stress.attacks import ATTACKS
from benchmarks.stress.payloads import chat, completion

QUIET = 8  # streams that are served all the while
HEALTH_EVERY, OTHERS_EVERY = 0.05, 0.5  # seconds
PEACE = 1.0  # seconds of streams alone before an attack, and five times as many before the first
LONGEST_HEALTH = 0.25  # seconds
MEMORY_BACK = 100 * 2**20  # bytes above what was there before that are no leak
SETTLE_SECONDS = 20.0  # in which memory has to come back
DRAIN_SECONDS, EXIT_SECONDS = 2.0, 10.0
ATTACK_SECONDS = 180.0  # in which any attack is over
STATES = ("engine.state_memory=1 GiB",)  # all of which is touched before memory is looked at
FILL = completion(prompt=[f"{number} states are many" for number in range(64)], max_tokens=64)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
HEALTH = request("GET", "/health")
STRUCTURED = completion(structured_outputs={"choice": ["yes", "no"]})
CHAT = chat(max_tokens=1)


@dataclass
class Watched:
    """What was seen while the server was watched. Times are in seconds."""

    health: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # chats and structured output of another client
    failures: Counter[str] = field(default_factory=Counter)
    longest_gap: float = 0.0
    rss: int = 0  # at most, in bytes
    children: int = 0


class Listener(Raw):
    """A client of one stream, which notes how long nothing comes."""

    def __init__(self, observer: Observer, request: bytes) -> None:
        self._observer = observer
        self._request = request
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last = time.perf_counter()
        self.end = "nothing came"  # the last line that did

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.look()
        self.last = time.perf_counter()
        self.end = data[-200:].decode(errors="replace").splitlines()[-1]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def look(self) -> None:
        self._observer.gap(time.perf_counter() - self.last)


class Observer:
    """The clients that mean no harm, and a look at the server's memory."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._process = psutil.Process(server.pid)
        self._watched = Watched()
        self._tasks: list[asyncio.Task[None]] = []
        self._listeners: set[Listener] = set()

    async def __aenter__(self) -> Observer:
        streams = [self._stream(number) for number in range(QUIET)]
        probes = [
            self._probe(HEALTH, HEALTH_EVERY, "health"),
            self._probe(CHAT, OTHERS_EVERY, "others"),
            self._probe(STRUCTURED, OTHERS_EVERY, "others"),
        ]
        self._tasks = [asyncio.create_task(each) for each in (*streams, *probes, self._look())]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.leave()
        await asyncio.sleep(0)  # in which they are closed

    def begin(self) -> None:
        """From here on, what is seen is of something new."""
        self._watched = Watched()

    def end(self) -> Watched:
        for listener in self._listeners:
            listener.look()  # a gap that has not ended yet
        return self._watched

    @property
    def alive(self) -> bool:
        return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the server, and of its children."""
        children = 0
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                children += child.memory_info().rss
        return self._process.memory_info().rss, children

    async def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while self.alive:
                rss, children = self.memory()
                self._watched.rss = max(self._watched.rss, rss)
                self._watched.children = max(self._watched.children, children)
                await asyncio.sleep(0.1)

    async def _stream(self, number: int) -> None:
        """A stream without an end; where it ends all the same, another one."""
        request = completion(prompt=f"{number}: Once", max_tokens=100_000, ignore_eos=True, stream=True)
        while True:
            listener = Listener(self, request)
            with contextlib.suppress(OSError):
                await listener.connect(self._server.port)
                self._listeners.add(listener)
                await listener.closed
            self._listeners.discard(listener)
            self._watched.failures[f"quiet stream ended: {listener.end}"] += 1
            await asyncio.sleep(0.2)

    def gap(self, seconds: float) -> None:
        self._watched.longest_gap = max(self._watched.longest_gap, seconds)

    async def _probe(self, request: bytes, every: float, what: str) -> None:
        while True:
            began = time.perf_counter()
            status = await status_of(self._server.port, request)
            getattr(self._watched, what).append(time.perf_counter() - began)
            if status != 200:
                self._watched.failures[f"{what}: {status or 'no response'}"] += 1
            await asyncio.sleep(every)


@contextlib.contextmanager
def attacker(port: int, name: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has made the requests of the attack and waits for its order."""
    command = [sys.executable, "-m", "benchmarks.stress.attacks", "--port", str(port), name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


async def attack(observer: Observer, port: int, name: str, peace: float) -> dict[str, Any]:
    """Runs one attack, and reports what it did."""
    with attacker(port, name) as process:
        before = observer.memory()
        await asyncio.sleep(peace)
        observer.begin()
        began = time.perf_counter()
        try:
            async with asyncio.timeout(ATTACK_SECONDS):
                said, _ = await asyncio.to_thread(process.communicate, "go\n")
        except TimeoutError:
            said = '{"did not end": 1}'
    seconds = time.perf_counter() - began
    after = await settled(observer, before[0]) if observer.alive else (0, 0)
    seen = observer.end()
    return {
        "told": json.loads(said or "{}"),
        "seconds": round(seconds, 2),
        "alive": observer.alive,
        "health_longest_ms": ms(max(seen.health, default=0.0)),
        "health_median_ms": ms(statistics.median(seen.health or [0.0])),
        "gap_longest_ms": ms(seen.longest_gap),
        "others_longest_ms": ms(max(seen.others, default=0.0)),
        "failures": dict(seen.failures),
        "mib": {
            "before": before[0] >> 20,
            "most": seen.rss >> 20,
            "after": after[0] >> 20,
            "children_most": seen.children >> 20,
            "children_after": after[1] >> 20,
        },
    }


async def settled(observer: Observer, before: int) -> tuple[int, int]:
    """The memory once it is back, or after SETTLE_SECONDS."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (found := observer.memory())[0] > before + MEMORY_BACK and time.monotonic() < deadline:  # noqa: ASYNC110 - another process frees it
        await asyncio.sleep(0.2)
    return found


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def faults_of(name: str, found: Mapping[str, Any], longest_health: float) -> list[str]:
    """What was wrong with one attack's end."""
    faults = []
    if not found["alive"]:
        faults.append("the server died")
    faults += [f"{count} times {what}" for what, count in found["failures"].items()]
    faults += [f"{count} attackers got {status}" for status, count in found["told"].items() if "500" in status]
    if "did not end" in found["told"]:
        faults.append("the attack did not end")
    if found["health_longest_ms"] > longest_health * 1000:
        faults.append(f"/health took {found['health_longest_ms']} ms")
    if found["mib"]["after"] > found["mib"]["before"] + (MEMORY_BACK >> 20):
        faults.append(f"{found['mib']['after'] - found['mib']['before']} MiB did not come back")
    return [f"{name}: {fault}" for fault in faults]


def end(server: Served, name: str) -> dict[str, Any]:
    """SIGTERM in the midst of an attack."""
    assert server.process is not None
    with attacker(server.port, name) as attacking:
        assert attacking.stdin is not None
        attacking.stdin.write("go\n")
        attacking.stdin.flush()
        time.sleep(0.5)
        began = time.perf_counter()
        server.process.terminate()
        try:
            code: int | None = server.process.wait(LOST_SECONDS)
        except subprocess.TimeoutExpired:
            server.process.kill()
            code = None
    return {"seconds": round(time.perf_counter() - began, 2), "code": code}


async def rounds(names: Sequence[str], server: Served, chosen: argparse.Namespace, report: dict[str, Any]) -> list[str]:
    """Runs the attacks, until the server is dead; gives those that are left."""
    left, count = list(names), chosen.rounds
    await status_of(server.port, FILL)
    async with Observer(server) as observer:
        observer.begin()
        await asyncio.sleep(5 * chosen.peace)
        alone = observer.end()
        report.setdefault("alone", []).append(
            {"health_longest_ms": ms(max(alone.health, default=0.0)), "gap_longest_ms": ms(alone.longest_gap)}
        )
        while left:
            name = left.pop(0)
            found = [await attack(observer, server.port, name, chosen.peace)]
            while len(found) < count and observer.alive:
                found.append(await attack(observer, server.port, name, chosen.peace))
            report["attacks"][name] = found if count > 1 else found[0]
            report["faults"] += [fault for each in found for fault in faults_of(name, each, chosen.health)]
            tqdm.write(f"{name}: {json.dumps(found[-1])}", file=sys.stderr)
            if not observer.alive:
                return left
    return left


def run(chosen: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    report: dict[str, Any] = {"attacks": {}, "faults": []}
    left = list(names)
    with tempfile.TemporaryDirectory() as folder:
        template, log = Path(folder, "template.jinja"), Path(folder, "log")
        template.write_text(TEMPLATE)
        options = [*STATES, f"chat.template={template}", f"server.drain_seconds={DRAIN_SECONDS}", *chosen.set]
        while left:
            with served(*options, log=log) as server:
                left = asyncio.run(rounds(left, server, chosen, report))
                if not left and server.process is not None and server.process.poll() is None:
                    report["end"] = end(server, chosen.last)
            report["faults"] += log_faults(log)
    if "end" in report and (report["end"]["code"] != 0 or report["end"]["seconds"] > EXIT_SECONDS):
        report["faults"].append(f"SIGTERM: {report['end']}")
    return report


def log_faults(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [f"log: {line}" for line in lines if "Traceback" in line or " CRITICAL " in line][:20]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="prefixes of attacks' names; none is all of them")
    parser.add_argument("--rounds", type=int, default=1, help="of each attack")
    parser.add_argument("--health", type=float, default=LONGEST_HEALTH, help="seconds that /health may take")
    parser.add_argument("--peace", type=float, default=PEACE, help="seconds of streams alone before each attack")
    parser.add_argument("--last", choices=ATTACKS, default="compiler: multiples of a large number")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="of the server")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    names = [name for name in ATTACKS if not chosen.names or name.startswith(tuple(chosen.names))]
    head = report_head(("torch", "llguidance", "uvicorn"))
    report = run(chosen, names)
    write_report(chosen.out / "hostile.json", head | report)
    print(orjson.dumps({"faults": report["faults"], "end": report.get("end")}, option=orjson.OPT_INDENT_2).decode())
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
