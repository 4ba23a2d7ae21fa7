"""The simulation of one replica against a real server with the bundled model, on this machine.

    python -m benchmarks.fleet.agreement     # under four minutes; fails where they differ by more than 15 %

Loads of conversations follow each other, each of a seed of its own. Some calibrate: the server's own trace says how
long their steps took, with the server, its event loop and the clients on the same cores, of which least squares make
the costs of a step, and how much steps vary. What a first token takes longer for the client than for the engine is
drawn from what it took. The loads between, at another rate, are compared: the simulation plays them, knowing nothing of
them but what clients ask, and when they would if both were equally fast. Writes `fleet-agreement.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bdh_batch.checkpoint.checkpoint import open_checkpoint
from bdh_batch.checkpoint.config import bytes_per_sequence
from bdh_batch.engine.state_pool import slots_within
from bdh_batch.settings import Settings
from benchmarks import ROOT
from benchmarks.client import Response
from benchmarks.fleet.calibrated import Calibrated, Taken, first_tokens, steps
from benchmarks.fleet.engine import Engine, scheduler_of
from benchmarks.fleet.fleet import Fleet, Simulation, seconds_of
from benchmarks.fleet.load import Chats, Conversation, conversations
from benchmarks.fleet.streams import Stream
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

MODEL = ROOT / "models" / "bdh-shakespeare"
CHATS = Chats(pause=1.0, breaks=False)  # prompts are tokens
MEMORY = 2**31  # bytes of states
CLOSE = 0.15  # the largest difference
SECONDS = ("mean", "p50", "p90", "p99")
# A gap of a client has its own event loop in it, which nothing simulates: of those, means are compared.
COMPARED = {
    "first_token_s": SECONDS,
    "between_tokens_s": ("mean",),
    "between_tokens_of_engine_s": SECONDS,
    "engine": ("tokens/s", "busy"),
}
CALIBRATING = (0.6, 1.4)  # times the rate that is compared
WARM_UP_SECONDS, SETTLE_SECONDS = 5.0, 0.5


@dataclass
class Played:
    """A load that the server has had: when it began, by `time.perf_counter`, and its responses."""

    fleet: Fleet
    begin: float
    responses: list[tuple[float, Response]] = field(default_factory=list)  # and when they were asked for
    steps: list[Taken] = field(default_factory=list)  # those of the server's trace

    def includes(self, moment: float) -> bool:
        return self.begin <= moment <= self.end

    @property
    def busy(self) -> float:
        """Seconds of all steps."""
        return sum(step.seconds for step in self.steps)

    @cached_property
    def end(self) -> float:
        """When the last token came."""
        return max(response.times[-1] for _, response in self.responses)

    @property
    def warm(self) -> list[Response]:
        return [response for asked, response in self.responses if asked >= self.begin + self.fleet.warm]

    @property
    def first_tokens(self) -> list[float]:
        return [response.first for response in self.warm]

    @property
    def gaps(self) -> list[float]:
        """Seconds between each two tokens of a request."""
        return [later - one for each in self.warm for one, later in pairwise(each.times)]

    @property
    def engine_gaps(self) -> list[float]:
        """The same by the engine's trace: a stream has a token in each step, as long as all fit."""
        warm = [step for step in self.steps if step.at >= self.begin + self.fleet.warm]
        return [step.seconds for step in warm for _ in range(step.decodes)]

    @property
    def tokens(self) -> int:
        return sum(len(response.tokens) for _, response in self.responses)

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


# The simulation


@dataclass
class Simulated:
    """A load that the simulation has had.

    Args:
        begin: when it began.
        end: when the last token of the load came.
        busy: seconds of all steps.
        warm: its requests after the warm-up.
    """

    begin: float
    end: float
    busy: float
    tokens: int
    warm: list[Stream]

    @property
    def first_tokens(self) -> list[float]:
        return [stream.first - stream.arrived for stream in self.warm if stream.first is not None]

    @property
    def gaps(self) -> list[float]:
        """Seconds between each two tokens of a request."""
        return [later - one for each in self.warm for one, later in pairwise(each.times)]

    @property
    def engine_gaps(self) -> list[float]:
        return self.gaps

    @property
    def cached_share(self) -> float:
        prompts = sum(len(stream.request.prompts[0].tokens) for stream in self.warm)
        return sum(stream.work.cached for stream in self.warm) / prompts


class Replica:
    """Makes engines like the server's."""

    def __init__(self) -> None:
        self._config = open_checkpoint(MODEL).config
        self._state_bytes = bytes_per_sequence(self._config, self._config.suggested_window, torch.float32)
        self._settings = Settings()
        most = self._settings.scheduler.max_running + self._settings.prefix_cache.entries
        self.slots = slots_within(MEMORY, self._state_bytes, most)

    def simulated(self, loads: Sequence[Played], costs: Calibrated) -> list[Simulated]:
        """Plays loads one after the other, as the server has had them, on one engine with one cache."""
        engine = Engine(scheduler_of(self._settings, self._config, self.slots, self._state_bytes), costs, leaps=False)
        found = []
        for load in loads:
            fleet, before = replace(load.fleet, begins=load.begin - loads[0].begin), costs.spent
            simulation = Simulation(fleet, lambda: engine)
            simulation.run()
            streams, warm = (
                simulation.streams,
                [s for s in simulation.streams if s.arrived >= fleet.begins + fleet.warm],
            )
            end, tokens = max(stream.last for stream in streams), sum(stream.tokens for stream in streams)
            found.append(Simulated(fleet.begins, end, costs.spent - before, tokens, warm))
        return found


def compare(replica: Replica, loads: Sequence[Played], rate: float, trace: Sequence[str]) -> dict[str, Any]:
    """Compares the loads of that `rate` with the simulation, whose costs are those of the others.

    Args:
        loads: the first one has only warmed up.
        trace: the lines of the server's.
    """
    every = [*steps(trace)]
    for load in loads:
        load.steps = [step for step in every if load.includes(step.at)]
    calibrating = [load for load in loads[1:] if load.fleet.rate != rate]
    costs = Calibrated([step for load in calibrating for step in load.steps])
    ways = ways_of(calibrating, first_tokens(trace))
    both = zip(loads, replica.simulated(loads, costs), strict=True)
    pairs = [(load, simulated) for load, simulated in both if load.fleet.rate == rate and load is not loads[0]]
    sides = {
        "measured": figures([load for load, _ in pairs]),
        "simulated": figures([simulated for _, simulated in pairs], ways),
    }
    return {
        "cost": asdict(costs.cost),
        "way_s": seconds_of(iter(ways)),
        **sides,
        "simulated_over_measured": {
            name: {each: sides["simulated"][name][each] / sides["measured"][name][each] for each in which}
            for name, which in COMPARED.items()
        },
    }


def ways_of(loads: Sequence[Played], of_engine: Iterable[tuple[float, float]]) -> list[float]:
    """The seconds that first tokens took longer for their clients than for the engine. Requests are paired in the order
    in which they came, of which two at once may have changed places on the way.

    Args:
        of_engine: when requests arrived there, and the seconds until their first tokens.
    """
    asked = sorted((at, response.first) for load in loads for at, response in load.responses)
    arrived = sorted(each for each in of_engine if any(load.includes(each[0]) for load in loads))
    return [client - engine for (_, client), (_, engine) in zip(asked, arrived, strict=True)]


def figures(loads: Sequence[Played | Simulated], ways: Sequence[float] = (0.0,)) -> dict[str, Any]:
    """Of all loads together; a first token takes the seconds of one of the `ways` more."""
    seconds, draw = sum(each.end - each.begin for each in loads), random.Random(0)
    return {
        "requests": sum(len(each.first_tokens) for each in loads),
        "first_token_s": seconds_of(each + draw.choice(ways) for load in loads for each in load.first_tokens),
        "between_tokens_s": seconds_of(seconds for each in loads for seconds in each.gaps),
        "between_tokens_of_engine_s": seconds_of(seconds for each in loads for seconds in each.engine_gaps),
        "engine": {
            "tokens/s": round(sum(each.tokens for each in loads) / seconds, 2),
            "busy": round(sum(each.busy for each in loads) / seconds, 4),
        },
        "cached_share_of_prompts": round(mean(each.cached_share for each in loads), 4),
    }


def disagreeing(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [
        f"{name}, {which}: {ratio:.3f}"
        for name, found in ratios.items()
        for which, ratio in found.items()
        if abs(ratio - 1) > CLOSE
    ]


def table(found: Mapping[str, Any]) -> str:
    """A line for each figure that is compared."""
    lines = [f"{'':32} {'measured':>10} {'simulated':>10} {'ratio':>7}"]
    for name, ratios in found["simulated_over_measured"].items():
        for which, ratio in ratios.items():
            measured, simulated = (found[side][name][which] for side in ("measured", "simulated"))
            verdict = "agrees" if abs(ratio - 1) <= CLOSE else "DIFFERS"
            lines.append(f"{f'{name}, {which}':32} {measured:10.5g} {simulated:10.5g} {ratio:7.3f}  {verdict}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.fleet.agreement",
    )
    parser.add_argument("--rounds", type=int, default=2, help="of two loads that calibrate, and two that are compared")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second of the compared loads")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


async def measure(server: Served, chosen: argparse.Namespace) -> list[Played]:
    """A load that warms up, and then those that calibrate and are compared in turns; none begins as another does."""
    fleet = Fleet(1, chosen.rate, chosen.seconds, warm=0.2 * chosen.seconds)
    loads = [replace(fleet, seconds=WARM_UP_SECONDS)]
    for times in (*CALIBRATING,) * chosen.rounds:
        loads += [replace(fleet, rate=times * chosen.rate), fleet]
    return [
        await play(server, replace(load, seed=seed, chats=replace(CHATS, first=1000 * seed)))
        for seed, load in enumerate(loads)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    head = report_head(["torch", "numba", "uvicorn", "uvloop"])
    replica = Replica()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.jsonl")
        with served(f"engine.state_memory={MEMORY}", f"scheduler.trace_file={trace}") as server:
            loads = asyncio.run(measure(server, chosen))
        found = compare(replica, loads, chosen.rate, trace.read_text("utf-8").splitlines())
    settings = {"rounds": chosen.rounds, "seconds": chosen.seconds, "rate": chosen.rate, "slots": replica.slots}
    write_report(chosen.out / "fleet-agreement.json", {**head, **settings, "chats": asdict(CHATS), **found})
    print(table(found))
    if wrong := disagreeing(found["simulated_over_measured"]):
        sys.exit(f"the simulation is more than {CLOSE:.0%} off: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
