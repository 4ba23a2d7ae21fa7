"""The simulation of one replica against a real server with the bundled model, on this machine.

    python -m benchmarks.fleet.agreement     # under three minutes; fails where they differ by more than 15 %

Rounds of two loads take turns, both made of conversations that begin at random, but of different seeds. In the first
load the server's own trace says how long steps take, of which least squares make the costs of a step; and what a first
token takes more over HTTP than in the simulation of that load is the constant that stands for the way there and back.
The second load is played by the simulation, knowing nothing of it but what clients ask, and when they would if both
were equally fast. Writes `fleet-agreement.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy
import torch

from bdh_batch.checkpoint.checkpoint import open_checkpoint
from bdh_batch.checkpoint.config import bytes_per_sequence
from bdh_batch.engine.state_pool import slots_within
from bdh_batch.messages import Copy
from bdh_batch.settings import Settings
from benchmarks import ROOT
from benchmarks.client import Response
from benchmarks.engine.play import Cost
from benchmarks.fleet.engine import Engine, copied, scheduler_of
from benchmarks.fleet.fleet import Fleet, Simulation, seconds_of
from benchmarks.fleet.load import Chats, Conversation, conversations
from benchmarks.fleet.streams import Stream
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

MODEL = ROOT / "models" / "bdh-shakespeare"
CHATS = Chats(pause=1.0)
MEMORY = 2**31  # bytes of states
CLOSE = 0.15  # the largest difference
COMPARED = {"first_token_s": ("mean", "p50", "p90", "p99"), "between_tokens_s": ("mean", "p50", "p90")}
FAILING = {"first_token_s": ("mean", "p50", "p90"), "between_tokens_s": ("mean", "p50")}  # a p99 is of few requests
WARM_UP_SECONDS, SETTLE_SECONDS = 5.0, 0.5


@dataclass
class Played:
    """A load that the server has had: when that was, by `time.perf_counter`, and its responses."""

    fleet: Fleet
    begin: float
    end: float = 0.0
    responses: list[tuple[float, Response]] = field(default_factory=list)  # and when they were asked for

    @property
    def warm(self) -> list[Response]:
        return [response for asked, response in self.responses if asked >= self.begin + self.fleet.warm]

    @property
    def first_tokens(self) -> list[float]:
        return [response.first for response in self.warm]

    @property
    def gaps(self) -> list[float]:
        """Mean seconds between the tokens of each request."""
        return [(each.times[-1] - each.times[0]) / (len(each.times) - 1) for each in self.warm if len(each.times) > 1]

    @property
    def cached_share(self) -> float:
        return sum(each.cached_tokens for each in self.warm) / sum(len(each.prompt) for each in self.warm)


async def play(server: Served, fleet: Fleet) -> Played:
    """Has clients ask as those of the simulation do."""
    played = Played(fleet, time.perf_counter())
    over = played.begin + fleet.seconds
    async with asyncio.TaskGroup() as clients:
        for at, conversation in conversations(fleet.chats, fleet.rate, fleet.seed):
            if at >= fleet.seconds:
                break
            await asyncio.sleep(played.begin + at - time.perf_counter())
            clients.create_task(converse(server, conversation, over, played))
    played.end = time.perf_counter()
    await asyncio.sleep(SETTLE_SECONDS)
    return played


async def converse(server: Served, conversation: Conversation, over: float, played: Played) -> None:
    while time.perf_counter() < over:
        request = conversation.next()
        prompt, asked = [*request.prompts[0].tokens], time.perf_counter()
        response = await server.ask(prompt=prompt, max_tokens=request.max_tokens, ignore_eos=True, seed=1)
        played.responses.append((asked, response))
        pause = conversation.heard(response.tokens)
        if pause is None:
            return
        await asyncio.sleep(pause)


# What steps cost


def steps(lines: Iterable[str]) -> Iterator[tuple[float, tuple[float, int, int, float]]]:
    """From a trace: of each step when it was planned, and its seconds, streams, prompt tokens and copied states. Where
    work was left after it, its seconds last until the next one was planned."""
    last: Mapping[str, Any] | None = None
    present: set[int] = set()
    left: int | None = None  # requests after the last step's ends, once others were submitted
    for line in lines:
        event = json.loads(line)
        if event["event"] == "submit":
            left = len(present) if left is None else left
            present.add(event["place"])
        elif event["event"] == "end":
            present.discard(event["place"])
        elif event["event"] == "step":
            if last is not None:
                busy = len(present) if left is None else left
                yield last["now"], _step(last, event["now"] - last["now"] if busy else last["seconds"])
            last, left = event, None


def _step(event: Mapping[str, Any], seconds: float) -> tuple[float, int, int, float]:
    copies = copied([Copy(*copy) for copy in event["copies"]])
    return seconds, event["decodes"], sum(event["prefill"].values()), copies


def fitted(rows: Sequence[tuple[float, int, int, float]]) -> Cost:
    """By least squares; nothing costs less than nothing."""
    seconds = numpy.array([row[0] for row in rows])
    features = numpy.array([[1.0, *row[1:]] for row in rows])
    found, *_ = numpy.linalg.lstsq(features, seconds, rcond=None)
    return Cost(*(max(0.0, float(each)) for each in found))


# The simulation


@dataclass
class Simulated:
    """A load that the simulation has had: its requests after the warm-up."""

    streams: list[Stream]

    @property
    def first_tokens(self) -> list[float]:
        return [stream.first - stream.arrived for stream in self.streams if stream.first is not None]

    @property
    def gaps(self) -> list[float]:
        """Mean seconds between the tokens of each request."""
        return [
            (stream.last - stream.first) / (stream.tokens - 1)
            for stream in self.streams
            if stream.first is not None and stream.tokens > 1
        ]

    @property
    def cached_share(self) -> float:
        prompts = sum(len(stream.request.prompts[0].tokens) for stream in self.streams)
        return sum(stream.work.cached for stream in self.streams) / prompts


class Replica:
    """Makes engines like the server's."""

    def __init__(self) -> None:
        self._config = open_checkpoint(MODEL).config
        self._state_bytes = bytes_per_sequence(self._config, self._config.suggested_window, torch.float32)
        self._settings = Settings()
        most = self._settings.scheduler.max_running + self._settings.prefix_cache.entries
        self.slots = slots_within(MEMORY, self._state_bytes, most)

    def simulated(self, loads: Sequence[Played], cost: Cost) -> list[Simulated]:
        """Plays loads one after the other, as the server has had them, on one engine with one cache."""
        engine = Engine(scheduler_of(self._settings, self._config, self.slots, self._state_bytes), cost)
        found = []
        for load in loads:
            fleet = replace(load.fleet, begins=load.begin - loads[0].begin)
            simulation = Simulation(fleet, lambda: engine)
            simulation.run()
            warm = fleet.begins + fleet.warm
            found.append(Simulated([stream for stream in simulation.streams if stream.arrived >= warm]))
        return found


def compare(replica: Replica, loads: Sequence[Played], trace: Path) -> dict[str, Any]:
    """Fits the costs to every other one of the loads after the first, and compares those between."""
    learnt, tested = loads[1::2], loads[2::2]
    rows = [
        row for at, row in steps(trace.read_text().splitlines()) if any(each.begin <= at < each.end for each in learnt)
    ]
    cost = fitted(rows)
    simulated = replica.simulated(loads, cost)
    way = mean(seconds for each in learnt for seconds in each.first_tokens) - mean(
        seconds for each in simulated[1::2] for seconds in each.first_tokens
    )
    sides = {"measured": figures(tested, 0.0), "simulated": figures(simulated[2::2], way)}
    return {
        "cost": asdict(cost),
        "way_s": way,
        "steps_fitted": len(rows),
        **sides,
        "simulated_over_measured": {
            name: {each: sides["simulated"][name][each] / sides["measured"][name][each] for each in which}
            for name, which in COMPARED.items()
        },
    }


def figures(sides: Sequence[Played | Simulated], way: float) -> dict[str, Any]:
    """Of all rounds together; a first token takes the seconds of the `way` more."""
    return {
        "requests": sum(len(each.first_tokens) for each in sides),
        "first_token_s": seconds_of(seconds + way for each in sides for seconds in each.first_tokens),
        "between_tokens_s": seconds_of(seconds for each in sides for seconds in each.gaps),
        "cached_share_of_prompts": round(mean(each.cached_share for each in sides), 4),
    }


def disagreeing(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"{name}, {each}: {ratios[name][each]:.3f}"
        for name, which in FAILING.items()
        for each in which
        if abs(ratios[name][each] - 1) > CLOSE
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.fleet.agreement",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=18.0, help="of each load")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


async def measure(server: Served, chosen: argparse.Namespace) -> list[Played]:
    """A load that warms up, and then in turns one to learn from and one to compare; none begins as another does."""
    fleet = Fleet(1, chosen.rate, chosen.seconds, warm=0.2 * chosen.seconds)
    seconds = [WARM_UP_SECONDS, *[chosen.seconds] * (2 * chosen.rounds)]
    return [
        await play(server, replace(fleet, seconds=each, seed=seed, chats=replace(CHATS, first=1000 * seed)))
        for seed, each in enumerate(seconds)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    head = report_head(["torch", "numba", "uvicorn", "uvloop"])
    replica = Replica()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.jsonl")
        with served(f"engine.state_memory={MEMORY}", f"scheduler.trace_file={trace}") as server:
            loads = asyncio.run(measure(server, chosen))
        found = compare(replica, loads, trace)
    settings = {"rounds": chosen.rounds, "seconds": chosen.seconds, "rate": chosen.rate, "slots": replica.slots}
    write_report(chosen.out / "fleet-agreement.json", {**head, **settings, "chats": asdict(CHATS), **found})
    print(json.dumps(found, indent=2))
    if wrong := disagreeing(found["simulated_over_measured"]):
        sys.exit(f"the simulation is more than {CLOSE:.0%} off: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
