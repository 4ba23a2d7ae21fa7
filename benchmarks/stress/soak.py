"""Keeps a server busy with clients that stay, leave, dawdle, never read, send nonsense; in the end nothing may be left.

    python -m benchmarks.stress.soak --faults                                # 20 minutes with a server that fails
    python -m benchmarks.stress.soak --disconnects 10000                     # until so many clients have left
    python -m benchmarks.stress.soak --url http://127.0.0.1:8000 --pid 4711  # any server; without --pid no memory

Unless it is given one, it starts a server of its own (`faulty.py`), with few slots for states and a short queue. Ends
with exit code 1 where anything was wrong, and says what: a response that was cut or came to an end that its client had
not asked for, a hang, a fault in the log, anything that runs or waits or lives on at rest, a slot that cannot be used
any more, a thread or a file too many, memory that grows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from bdh_batch.bench.outcome import Failed
from bdh_batch.processes.model_settings import bundled_model
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.stress.clients import Target, asks_little, holds_on, meet
from benchmarks.stress.crowd import Soak, Watch
from benchmarks.stress.watched import KEYS, REST_SECONDS, RUNNING, WORDY, Metrics, Own, Watched

OURS = (
    "bdh_batch.engine.mailbox.Mailbox",
    "bdh_batch.scheduler.sequence.Sequence",
    "bdh_batch.backends.local.LocalGeneration",
)


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
        found.append(f"of the slots only {report['places']:.0%} can be used")
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
    except (Failed, TimeoutError, psutil.Error) as error:
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
        return await judged(server, Target(server.host, server.port), chosen)
    with tempfile.TemporaryDirectory() as folder:
        own = Own(chosen.model, chosen.seed, chosen.faults, Path(folder))
        try:
            server = await own.ready()
            report = await judged(server, Target(server.host, server.port, KEYS, WORDY), chosen)
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
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    head = report_head(("torch", "numba", "uvicorn"))
    report = asyncio.run(with_a_server(chosen))
    about = {"model": chosen.model.name if chosen.url is None else chosen.url, "clients": chosen.clients}
    file = chosen.out / ("soak.json" if chosen.disconnects is None else "soak-disconnects.json")
    write_report(file, head | about | report)
    print(json.dumps({name: report.get(name) for name in ("requests", "disconnects", "faults")}, indent=2))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
