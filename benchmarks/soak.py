"""Keeps a server busy with clients that stay, leave, dawdle, never read, send nonsense; in the end nothing may be left.

    python -m benchmarks.soak --faults                                # 20 minutes with a server that fails now and then
    python -m benchmarks.soak --disconnects 10000                     # until so many clients have left
    python -m benchmarks.soak --url http://127.0.0.1:8000 --pid 4711  # any server; without --pid its memory is not seen

Unless it is given one, it starts a server of its own (`benchmarks/faulty.py`), with few slots for states and a short
queue. Ends with exit code 1 where anything was wrong, and says what: a response that was cut or came to an end that its
client had not asked for, a hang, a fault in the log, anything that runs or waits or lives on at rest, a slot that
cannot be had any more, a thread or a file too many, memory that grows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from bdh_batch.checkpoint.config import BDHConfig, bytes_per_sequence
from bdh_batch.engine.loading import attention_window
from bdh_batch.server import bundled_model
from benchmarks.clients import KINDS, LEFT, REFUSED, Target, asks_little, holds_on, meet, never_reads
from benchmarks.common import report_head, write_json

DEVICE, HOST, RUNNING, QUEUED = 16, 16, 24, 48  # slots for states, sequences under way, requests that wait
KEYS = ("soak-1", "soak-2", "soak-3")
WORDY = "soak-" + "x" * 4000
FOR_EVER = 1e9
STATUES = 3  # clients that do not read from the first byte to the last
START_SECONDS = 600.0  # on a machine that is busy otherwise, too
REST_SECONDS = 60.0
STOP_SECONDS = 60.0
MOST_FAULTS = 200  # more need no further proof
SAMPLES = 240
INJECTED = (
    "The step that computed this request failed.",
    "The model gave a result that is not a finite number.",
    "There is not enough memory for the request.",
)
OURS = (
    "bdh_batch.engine.mailbox.Mailbox",
    "bdh_batch.scheduler.sequence.Sequence",
    "bdh_batch.backends.local.LocalGeneration",
)
BAD_LINES = re.compile(
    r"Task exception|Exception in|exception was never retrieved| CRITICAL | ERROR asyncio|request \S+ to"
)

Ends = defaultdict[str, Counter[str]]
Metrics = dict[str, float]


class Watched:
    """A server, and what can be seen of it from outside; of a process of ours its objects, too."""

    def __init__(self, url: str, pid: int | None, census_file: Path | None = None) -> None:
        self.url = httpx.URL(url)
        self.process = None if pid is None else psutil.Process(pid)
        self._census_file = census_file
        self._http = httpx.AsyncClient(base_url=url, timeout=60.0, headers={"connection": "close"})

    async def metrics(self) -> Metrics:
        families = text_string_to_metric_families((await self._http.get("/metrics")).text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    async def health(self) -> str:
        response = await self._http.get("/health")
        return "ok" if response.status_code == 200 else response.text

    def sample(self) -> dict[str, int]:
        if self.process is None:
            return {}
        with self.process.oneshot():
            return {
                "rss": self.process.memory_info().rss,
                "threads": self.process.num_threads(),
                "files": self.process.num_fds(),
            }

    async def census(self) -> dict[str, Any]:
        if self.process is None or self._census_file is None:
            return {}
        self._census_file.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        file = self._census_file
        await until(file.exists, REST_SECONDS)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


async def until(condition: Callable[[], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.02)


class Own:
    """A server that the soak starts and ends."""

    def __init__(self, model: Path, seed: int, often: float, folder: Path) -> None:
        self.log = folder / "log"
        self._census = folder / "census.json"
        self._output = folder / "url"
        arguments = ["--seed", seed, "--often", often, "--census", self._census]
        for option in options_for(model):
            arguments += ["--set", option]
        environment = {name: text for name, text in os.environ.items() if not name.upper().startswith("BDH_")}
        with self.log.open("wb") as log, self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.faulty", *map(str, arguments)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
            )

    async def ready(self) -> Watched:
        def there() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at its start:\n{self.log.read_text()}")
            return self._output.read_bytes().endswith(b"\n")

        await until(there, START_SECONDS)
        return Watched(self._output.read_text().strip(), self.process.pid, self._census)

    def stop(self) -> list[str]:
        """Ends it as its user would; what was wrong with its end, and what its log says."""
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        lines = [f"log: {line}" for line in self.log.read_text().splitlines() if BAD_LINES.search(line)]
        return [*lines[:20], *([f"the server's exit code is {code}"] if code else [])]


def options_for(model: Path) -> list[str]:
    """Few slots, so that all of them are used, and everything that happens when they are."""
    config = BDHConfig.from_dict(json.loads((model / "config.json").read_text()))
    each = bytes_per_sequence(config, attention_window(None, config))
    return [
        "server.port=0",
        f"model.path={model}",
        f"model.aliases={WORDY}",
        "auth.enabled=true",
        f"auth.api_keys={','.join(KEYS)}",
        f"engine.state_memory={DEVICE * each}",
        f"prefix_cache.host_memory={HOST * each}",
        "engine.threads=1",  # the clients need a core, too
        f"scheduler.max_running={RUNNING}",
        f"scheduler.max_queued_requests={QUEUED}",
        "scheduler.quantum_steps=8",
    ]


class Soak:
    """A crowd of clients, and the ends that they came to.

    Args:
        injected: whether the server is made to fail, so that some ends are no faults.
        disconnects: how many clients are to leave; None is a crowd of all kinds.
    """

    def __init__(self, target: Target, clients: int, seed: int, injected: bool, disconnects: int | None) -> None:
        self._target = target
        self._clients = clients
        self._draw = random.Random(seed)
        self._expected = {f"{how} {text}" for how in ("event", "500") for text in INJECTED} if injected else set()
        self._disconnects = disconnects
        self._weights = [kind.weight if disconnects is None else kind.disconnects for kind in KINDS.values()]
        self.ends: Ends = defaultdict(Counter)
        self.faults: Counter[str] = Counter()

    @property
    def requests(self) -> int:
        return sum(ends.total() for ends in self.ends.values())

    @property
    def left(self) -> int:
        return sum(ends[LEFT] for ends in self.ends.values())

    async def run(self, seconds: float) -> None:
        """So long, or until enough have left; nobody is there any more afterwards."""
        over = self._target.over
        over.clear()
        timer = asyncio.get_running_loop().call_later(seconds, over.set)
        await asyncio.gather(*(self._statue() for _ in range(STATUES)), *(self._client() for _ in range(self._clients)))
        timer.cancel()

    async def _client(self) -> None:
        while not self._target.over.is_set():
            name = self._draw.choices(list(KINDS), self._weights)[0]
            end = await meet(KINDS[name].habit, self._target, random.Random(self._draw.random()))
            self._count(name, end)
            if end == REFUSED:
                await asyncio.sleep(self._draw.uniform(0.05, 0.5))

    async def _statue(self) -> None:
        end = await meet(partial(never_reads, seconds=FOR_EVER), self._target, random.Random(self._draw.random()))
        self._count("never reads", end)

    def _count(self, name: str, end: str) -> None:
        self.ends[name][end] += 1
        if end not in KINDS[name].ends | self._expected | {REFUSED}:
            self.faults[fault := f"{name}: {end}"] += 1
            tqdm.write(fault, file=sys.stderr)
        enough = self._disconnects is not None and self.left >= self._disconnects
        if enough or self.faults.total() >= MOST_FAULTS:
            self._target.over.set()


def at_rest(metrics: Metrics) -> bool:
    """Nobody is being served, but who asks for the metrics."""
    names = [f"bdh_num_requests_{state}" for state in ("running", "waiting", "swapped")]
    return not any(metrics[name] for name in names) and metrics["bdh_http_requests_in_flight"] <= 1


async def until_rest(server: Watched) -> Metrics:
    """The metrics at rest, or after REST_SECONDS."""
    began = time.monotonic()
    while not at_rest(metrics := await server.metrics()) and time.monotonic() - began < REST_SECONDS:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return metrics


async def rest(server: Watched, target: Target) -> dict[str, Any]:
    """What is there when nobody asks for anything. A last small request leaves no traces of the crowd's last step."""
    began = time.monotonic()
    await until_rest(server)
    seconds = time.monotonic() - began
    await meet(asks_little, target, random.Random(0))
    metrics = await until_rest(server)
    return {
        "seconds_to_rest": round(seconds, 2),
        "running": metrics["bdh_num_requests_running"],
        "waiting": metrics["bdh_num_requests_waiting"],
        "suspended": metrics["bdh_num_requests_swapped"],
        "http_requests": metrics["bdh_http_requests_in_flight"] - 1,
        "kept_states": metrics["bdh_prefix_cache_states"],
        "health": await server.health(),
        **await server.census(),  # by the server's event loop, which has closed the last connection by then
        **server.sample(),
    }


async def fill(server: Watched, target: Target) -> float:
    """The share of the slots that can be held at a time: less than 1 where one was never given back."""

    async def hold(number: int) -> None:
        while not target.over.is_set():
            await meet(holds_on, target, random.Random(number))

    target.over.clear()
    crowd = [asyncio.create_task(hold(number)) for number in range(RUNNING)]
    most, began = 0.0, time.monotonic()
    while most < 1 and time.monotonic() - began < REST_SECONDS:
        most = max(most, (await server.metrics())["bdh_state_slots_usage_perc"])
    target.over.set()
    await asyncio.gather(*crowd)
    return most


class Watch:
    """Looks at the process again and again while it serves, and shows how the soak gets on."""

    def __init__(self, server: Watched, soak: Soak, seconds: float) -> None:
        self._server, self._soak, self._seconds = server, soak, seconds
        self.samples: list[dict[str, int]] = []

    async def run(self) -> None:
        with tqdm(total=self._seconds, unit="s", bar_format="{l_bar}{bar}{postfix}", file=sys.stderr) as bar:
            began = time.monotonic()
            while True:
                self.samples.append(sample := self._server.sample())
                megabytes = sample.get("rss", 0) >> 20
                text = f"{self._soak.requests} requests, {self._soak.left} left, {self._soak.faults.total()} faults"
                bar.set_postfix_str(f"{text}, {megabytes} MiB", refresh=False)
                bar.update(min(self._seconds, time.monotonic() - began) - bar.n)
                await asyncio.sleep(self._seconds / SAMPLES)


def quarters(samples: Sequence[Mapping[str, int]]) -> dict[str, list[float]]:
    """Medians over each quarter of the time, of what was sampled; nothing where that was too little."""
    if len(samples) < 4:
        return {}
    parts = [samples[len(samples) * part // 4 : len(samples) * (part + 1) // 4] for part in range(4)]
    return {name: [statistics.median(sample[name] for sample in part) for part in parts] for name in samples[0]}


def faults_of(report: Mapping[str, Any], growth: float) -> list[str]:
    """What was wrong.

    Args:
        growth: of the memory, from the second quarter to the last, that is no leak yet; 0.02 is 2 %.
    """
    before, after = report["before"], report["after"]
    found = [f"{number} times {what}" for what, number in report["unexpected"].items()]
    found += [
        f"at rest {after[name]:g} {name}"
        for name in ("running", "waiting", "suspended", "http_requests")
        if after[name]
    ]
    if after["health"] != "ok":
        found.append(f"health: {after['health']}")
    if report["places"] is not None and report["places"] < 1:
        found.append(f"of the slots only {report['places']:.0%} can be had")
    for name in ("threads", "files", "tasks"):
        if after.get(name, 0) > before.get(name, 0):
            found.append(f"{after[name]} {name} at rest, {before[name]} before")
    for name in OURS if "live" in after else ():
        if after["live"].get(name, 0) > before["live"].get(name, 0):
            found.append(f"{after['live'][name]} {name} live at rest, {before['live'].get(name, 0)} before")
    _, second, _, last = report["quarters"].get("rss", [1, 1, 1, 1])
    if last > second * (1 + growth):
        found.append(f"memory grows: {second / 2**20:.1f} MiB in the second quarter, {last / 2**20:.1f} in the last")
    if (wanted := report["disconnects_wanted"]) is not None and report["disconnects"] < wanted:
        found.append(f"{report['disconnects']} clients left, not {wanted}")
    return found


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Types of which more live than before, most first."""
    more = Counter(after)
    more.subtract(before)
    return {name: number for name, number in more.most_common(12) if number > 0}


@contextlib.contextmanager
def ended_by(end: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM end the load early; it is judged all the same."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, end)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def put_to_the_test(server: Watched, target: Target, chosen: argparse.Namespace, report: dict[str, Any]) -> None:
    """Writes what it finds into `report`, so that a server which dies leaves what was seen until then."""
    warming = Soak(target, chosen.clients, chosen.seed, chosen.faults > 0, None)
    await warming.run(chosen.warm_up)  # fills caches and buffers: what is there now may stay
    report["before"] = await rest(server, target)
    soak = Soak(target, chosen.clients, chosen.seed + 1, chosen.faults > 0, chosen.disconnects)
    watch = Watch(server, soak, chosen.seconds)
    watching = asyncio.create_task(watch.run())
    began = time.monotonic()
    with ended_by(target.over.set):
        await soak.run(chosen.seconds)
    watching.cancel()
    report |= {
        "seconds": round(time.monotonic() - began, 1),
        "requests": soak.requests,
        "disconnects": soak.left,
        "disconnects_wanted": chosen.disconnects,
        "ends": soak.ends,
        "unexpected": warming.faults + soak.faults,
    }
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    report["quarters"] = quarters(watch.samples)
    await rest(server, target)
    report["places"] = await fill(server, target) if chosen.url is None else None
    report["after"] = await rest(server, target)


async def judged(server: Watched, target: Target, chosen: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    try:
        await put_to_the_test(server, target, chosen, report)
    except (httpx.TransportError, TimeoutError, psutil.Error) as error:
        faults = [f"{number} times {what}" for what, number in report.get("unexpected", {}).items()]
        return report | {"faults": [*faults, f"the server does not answer any more: {error!r}"]}
    censuses = report["before"], report["after"]
    report["grown"] = grown(*(census.get("live", {}) for census in censuses))
    report["faults"] = faults_of(report, chosen.growth)
    for census in censuses:
        live = census.pop("live", {})
        census |= {name.rpartition(".")[2]: live.get(name, 0) for name in OURS if live}
    return report


async def with_a_server(chosen: argparse.Namespace) -> dict[str, Any]:
    if chosen.url is not None:
        server = Watched(chosen.url, chosen.pid)
        return await judged(server, Target(server.url.host, server.url.port or 80), chosen)
    with tempfile.TemporaryDirectory() as folder:
        own = Own(chosen.model, chosen.seed, chosen.faults, Path(folder))
        try:
            server = await own.ready()
            report = await judged(server, Target(server.url.host, server.url.port or 80, KEYS, WORDY), chosen)
        finally:
            parting = own.stop()
    report["faults"] += parting
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="its process, on this machine")
    parser.add_argument("--model", type=Path, default=bundled_model(), help="a model folder, for the soak's own server")
    parser.add_argument(
        "--faults", type=float, nargs="?", const=1.0, default=0.0, help="its steps fail; a factor to how often"
    )
    parser.add_argument("--seconds", type=float, default=1200.0, help="begin no request after so long")
    parser.add_argument("--disconnects", type=int, help="end when so many clients have left, most of which do")
    parser.add_argument("--warm-up", type=float, default=30.0, help="seconds before anything is compared")
    parser.add_argument("--clients", type=int, default=48, help="at a time")
    parser.add_argument("--growth", type=float, default=0.02, help="of the memory, that is no leak yet")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    head = report_head(("torch", "numba", "uvicorn"))
    report = asyncio.run(with_a_server(chosen))
    about = {"model": chosen.model.name if chosen.url is None else chosen.url, "clients": chosen.clients}
    file = chosen.out / ("soak.json" if chosen.disconnects is None else "soak-disconnects.json")
    write_json(file, head | about | report)
    print(json.dumps({name: report.get(name) for name in ("requests", "disconnects", "faults")}, indent=2))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
