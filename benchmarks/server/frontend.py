"""Measures what the HTTP layer costs: one process streams to many clients, with an engine that computes nothing.

    python -m benchmarks.server.frontend             # 256 streams of 250 tokens, about two minutes
    python -m benchmarks.server.frontend --rounds 3  # about one
    python -m benchmarks.server.frontend --against ../before  # beside the server of another checkout, by turns

The server is the real one, from its socket to its scheduler and its worker's thread, started as `bdh-batch serve`
starts it; only the runner is not: it computes nothing, and draws the characters of a line (`modelless.py`). Two of them
run: `in step`, where a step waits until the event loop has been notified of the one before, so that a write has one
event, and `ahead`, where the engine may be some steps ahead, so that several events are ready and go out in one write.
Where a checkout is given, these two are also measured with its server: `in step, before` and `ahead, before`.
Beside them run two apps without an engine (`ceilings.py`): a bare ASGI loop that writes the same bytes for every token,
and one that makes and dumps a pydantic object for each.

Systems take turns; one process of clients counts events. What counts is the time in which all streams of a system are
under way. Figures are medians of rounds: events and tokens a second, events that a client's read brings, and the
microseconds of processor time that a token costs the server, all of its threads, and the clients; `figures` has the
rounds of two of them and their intervals. What a parameter costs is the difference of the server's time to that of
plain completions, round by round; the stop strings are never in the completions, nor any of their prefixes, which would
hold text back and join events. There are no figures if a stream has not exactly the tokens that it should have, and the
events beside them. An event has one token, unless its stream asks otherwise, or more are ready than a busy machine has
sent. Writes `frontend.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import psutil
import uvloop

from benchmarks import ROOT
from benchmarks.client import CHAT, COMPLETIONS
from benchmarks.common import figure, ratio
from benchmarks.raw import Raw, request as raw_request
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

TIMEOUT = 60.0  # seconds, of one system's turn
BEFORE = ", before"  # what the names of systems end with that are another checkout's
TOGETHER = 8  # tokens of a chunk, where several are asked for
DATA, DONE = b"data: ", b"[DONE]"
FRAME = b"\n\n"  # JSON has no line breaks, nor has what HTTP puts between chunks two of them
AHEAD = 8  # steps
WARM_TOKENS = 50
ROLE = "--process"  # the option before the role of a process of several
Figures = dict[str, float]


@dataclass(frozen=True)
class System:
    """Who is asked for what; `more` events come beside those of tokens, which have at least `together` tokens each."""

    server: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)
    more: int = 1  # [DONE]
    together: int = 1

    def events(self, tokens: int) -> int:
        """Of a whole stream, at most. A first token never waits for others."""
        return 1 + math.ceil((tokens - 1) / self.together) + self.more


PROMPT = {"prompt": "Count these."}
MESSAGES = {"messages": [{"role": "user", "content": "Count these."}]}


def asks(path: str = COMPLETIONS, more: int = 1, together: int = 1, **parameters: Any) -> System:
    return System("ahead", path, {**(MESSAGES if path == CHAT else PROMPT), **parameters}, more, together)


PLAIN = asks()
PARAMETERS = {
    "chat": asks(CHAT, more=2),  # its role
    "usage at the end": asks(stream_options={"include_usage": True}, more=2),
    "usage in every event": asks(stream_options={"include_usage": True, "continuous_usage_stats": True}, more=2),
    "logprobs of the token": asks(logprobs=0),
    "logprobs of 5": asks(logprobs=5),
    "chat, logprobs of 5": asks(CHAT, more=2, logprobs=True, top_logprobs=5),
    "a stop string": asks(stop=["\n\nUser:"]),
    "4 stop strings": asks(stop=["\n\nUser:", "###", "</s>", "<|end|>"]),
    f"chunks of {TOGETHER} tokens": asks(stream_options={"chunk_tokens": TOGETHER}, together=TOGETHER),
}
SYSTEMS = {
    "bare": System("ceilings", "/bare"),
    "pydantic": System("ceilings", "/pydantic"),
    "in step": System("in step", COMPLETIONS, PROMPT),
    "ahead": PLAIN,
    **PARAMETERS,
}


@dataclass(frozen=True)
class Mark:
    """How far everything has come at a moment; times are seconds.

    Args:
        reads: of each stream.
        server: of the server's processes that run, by their role and number.
    """

    at: float
    events: int
    reads: Sequence[int]
    server: Mapping[tuple[str, int], float]
    client: float


class Crowd:
    """Clients that send the same request at the same time, each on a connection of its own."""

    def __init__(self, server: Served, request: bytes, size: int) -> None:
        self.streams = [EventCounter(self, request) for _ in range(size)]
        self._port = server.port
        process = psutil.Process(server.pid)
        self._processes = [
            (role, each) for each in (process, *process.children(recursive=True)) if (role := role_of(each)) is not None
        ]
        self._unbegun = self._unended = size
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.all_began: Mark | None = None
        self.first_ended: Mark | None = None

    async def run(self) -> None:
        async with asyncio.timeout(TIMEOUT):
            for stream in self.streams:
                await stream.connect(self._port)
            for stream in self.streams:
                stream.ask()
            await self._ended

    def began(self) -> None:
        self._unbegun -= 1
        if not self._unbegun:
            self.all_began = self._mark()

    def ended(self) -> None:
        if self.first_ended is None:
            self.first_ended = self._mark()
        self._unended -= 1
        if not self._unended:
            self._ended.set_result(None)

    def tokens(self, mark: Mark) -> int:
        """Those that had come by then."""
        return sum(content(b"".join(each.pieces[:reads]))[0] for each, reads in zip(self.streams, mark.reads))

    def _mark(self) -> Mark:
        times: dict[tuple[str, int], float] = {}
        for role, process in self._processes:
            with suppress(psutil.NoSuchProcess):  # a process that waited for work, and has ended
                used = process.cpu_times()
                times[role, process.pid] = used.user + used.system
        events = sum(stream.events for stream in self.streams)
        reads = [stream.reads for stream in self.streams]
        return Mark(time.perf_counter(), events, reads, times, time.process_time())


def role_of(process: psutil.Process) -> str | None:
    """ "front" or "engine" for a process of that kind; "server" for all others; None for one that has ended."""
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return None
    role = command[command.index(ROLE) + 1] if ROLE in command else ""
    return role.partition("-")[0] or "server"


class EventCounter(Raw):
    """Counts the events that one client is sent, and keeps them: their tokens are counted when nothing is measured."""

    def __init__(self, crowd: Crowd, request: bytes) -> None:
        self.events = 0
        self.pieces: list[bytes] = []
        self.status = b""
        self._crowd = crowd
        self._request = request
        self._last = b""

    @property
    def reads(self) -> int:
        return len(self.pieces)

    def ask(self) -> None:
        self.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.status:
            self.status = data[:12]
            self._crowd.began()
        self.pieces.append(data)
        self.events += data.count(FRAME) + (self._last == b"\n" == data[:1])
        self._last = data[-1:]

    def connection_lost(self, error: Exception | None) -> None:
        self._crowd.ended()


def content(body: bytes) -> tuple[int, int]:
    """The tokens of a response so far, and its events that have none. A token is a character, or has an id."""
    tokens = others = 0
    for part in body.split(FRAME)[:-1]:
        _, _, data = part.partition(DATA)
        choices = orjson.loads(data)["choices"] if data != DONE else []
        found = sum(len(each.get("token_ids") or _text(each)) for each in choices)
        tokens += found
        others += not found
    return tokens, others


def _text(choice: Mapping[str, Any]) -> str:
    text: str = choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
    return text


def request(system: System, tokens: int) -> bytes:
    body = orjson.dumps({**system.body, "max_tokens": tokens, "temperature": 0.0, "stream": True})
    return raw_request("POST", system.path, body)


async def turn(name: str, system: System, server: Served, streams: int, tokens: int) -> Figures:
    """One system's figures of one round."""
    crowd = Crowd(server, request(system, tokens), streams)
    await crowd.run()
    found = {(stream.status, *content(b"".join(stream.pieces))) for stream in crowd.streams}
    if found != {(b"HTTP/1.1 200", tokens, system.more)}:
        wanted = f"{tokens} tokens and {system.more} events without"
        sys.exit(f"{name}: a stream should have {wanted}, but there were {found}.")
    begin, end = crowd.all_began, crowd.first_ended
    assert begin is not None
    assert end is not None
    counted = crowd.tokens(end) - crowd.tokens(begin)
    if not counted:
        sys.exit(f"{name}: no time in which all streams were under way; ask for more tokens.")
    seconds, events = end.at - begin.at, end.events - begin.events
    used: defaultdict[str, float] = defaultdict(float)
    for process, until in end.server.items():
        used[process[0]] += 1e6 * (until - begin.server[process]) / counted
    return {
        "events_per_second": events / seconds,
        "tokens_per_second": counted / seconds,
        "events_per_read": events / (sum(end.reads) - sum(begin.reads)),
        "server_us_per_token": sum(used.values()),
        **{f"{role}_us_per_token": each for role, each in used.items() if role != "server"},
        "client_us_per_token": 1e6 * (end.client - begin.client) / counted,
        "share_counted": counted / (streams * tokens),
    }


def servers(streams: int) -> dict[str, tuple[str, ...]]:
    """What runs each, as `python -m`."""
    crowd = ("--crowd", str(streams))
    return {
        "ceilings": ("benchmarks.server.ceilings", *crowd),
        "in step": ("benchmarks.server.modelless", *crowd, "--ahead", "1"),
        "ahead": ("benchmarks.server.modelless", *crowd, "--ahead", str(AHEAD)),
    }


def beside_another(systems: Mapping[str, System]) -> dict[str, System]:
    """The systems, and behind each of the two kinds of server the same of another checkout."""
    found: dict[str, System] = {}
    for name, system in systems.items():
        found[name] = system
        if name == system.server:
            found[name + BEFORE] = replace(system, server=name + BEFORE)
    return found


async def measure(
    systems: Mapping[str, System], streams: int, tokens: int, rounds: int, other: Path = ROOT
) -> dict[str, list[Figures]]:
    """The figures of every round of each system; they take turns. One round more goes before those that count.

    Args:
        other: the checkout of servers whose names end with BEFORE.
    """
    found: dict[str, list[Figures]] = {name: [] for name in systems}
    with ExitStack() as stack:
        running: dict[str, Served] = {}
        for name in {system.server: None for system in systems.values()}:
            module, root = servers(streams)[name.removesuffix(BEFORE)], other if name.endswith(BEFORE) else ROOT
            running[name] = stack.enter_context(served(module=module, root=root))
        gc.collect()
        gc.freeze()
        for number in range(rounds + 1):
            for name, system in systems.items():
                figures = await turn(name, system, running[system.server], streams, tokens if number else WARM_TOKENS)
                if number:
                    found[name].append(figures)
    return found


def summary(found: Mapping[str, Sequence[Figures]]) -> dict[str, Any]:
    """Medians of rounds, two of them with their rounds; beside what others do, and what each parameter costs beside
    plain completions."""
    medians = {
        name: {measure: round(statistics.median(each[measure] for each in rounds), 3) for measure in rounds[0]}
        for name, rounds in found.items()
    }
    rates = {name: [each["events_per_second"] for each in rounds] for name, rounds in found.items()}
    costs = {name: [each["server_us_per_token"] for each in rounds] for name, rounds in found.items()}
    return {
        "sides": medians,
        "figures": {
            name: {
                "events_per_second": figure(rates[name], "events/s", "higher"),
                "server_us_per_token": figure(costs[name], "µs", "lower"),
            }
            for name in found
        },
        "events_ratio_to": {
            other: {name: asdict(ratio(rates[name], rates[other])) for name in ("in step", "ahead")}
            for other in ("bare", "pydantic")
        },
        **({"events_ratio_to_before": before} if (before := ratios_to_before(rates)) else {}),
        "server_us_per_token_more_than_plain": {
            name: round(statistics.median(a - b for a, b in zip(costs[name], costs["ahead"], strict=True)), 3)
            for name in PARAMETERS
        },
    }


def ratios_to_before(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Events a second over those of the same server of another checkout, where that was measured."""
    return {name: asdict(ratio(found, rates[name + BEFORE])) for name, found in rates.items() if name + BEFORE in rates}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=250, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, whose server is measured beside this one's")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(arguments)
    head = report_head(["uvicorn", "uvloop", "starlette", "orjson"], cores=len(os.sched_getaffinity(0)))
    systems, other = (SYSTEMS, ROOT) if chosen.against is None else (beside_another(SYSTEMS), chosen.against.resolve())
    found = uvloop.run(measure(systems, chosen.streams, chosen.tokens, chosen.rounds, other))
    figures = summary(found)
    sizes = {"streams": chosen.streams, "tokens": chosen.tokens, "rounds": chosen.rounds, "ahead": AHEAD}
    write_report(chosen.out / "frontend.json", head | sizes | figures)
    for name, each in figures["sides"].items():
        print(f"{name:22} " + "  ".join(f"{measure} {value:,.2f}" for measure, value in each.items()))


if __name__ == "__main__":
    main()
