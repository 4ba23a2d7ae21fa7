"""The real server with a runner that fails now and then, and a census of its objects: what the soak puts to the test.

    python -m benchmarks.stress.faulty --seed 1 --often 1 --census /tmp/census.json --set server.port=8000

On SIGUSR1 it counts the objects that live, by their type, into the census file.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvloop

from bdh_batch import settings
from bdh_batch.engine.loading import LoadedEngine, load_engine
from bdh_batch.engine.worker import StepRunner
from bdh_batch.errors import OutOfMemory
from bdh_batch.messages import Outcome, Plan
from bdh_batch.server import serve

ROOMY = 24  # tokens of a step that never lacks memory, unless it is one sequence's: else steps would shrink to nothing
DAWDLE_SECONDS = 1.0
INJECTED = "injected"
ODDS = {  # of each fault in a step
    "not finite": 1 / 200,
    "dawdle": 1 / 2000,
    "fail": 1 / 1000,
    "fail late": 1 / 1000,
    "memory": 1 / 1000,
}


class FaultyRunner:
    """Computes as `runner` does, except where a seeded generator has it fail.

    Args:
        often: a factor to all odds; 0 is never.
        dawdle: seconds of a step that takes too long.
    """

    def __init__(self, runner: StepRunner, seed: int, often: float, dawdle: float = DAWDLE_SECONDS) -> None:
        self._runner = runner
        self._chance = random.Random(seed)
        self._dawdle = dawdle
        self._odds = {fault: often * odds for fault, odds in ODDS.items()}
        self.made: Counter[str] = Counter()

    def run(self, plan: Plan) -> Outcome:
        fault = self._draw()
        if fault == "memory" and (plan.tokens <= ROOMY and len(plan.segments) != 1):
            fault = None
        if fault is None:
            return self._runner.run(plan)
        self.made[fault] += 1
        if fault == "fail":
            raise RuntimeError(INJECTED)
        if fault == "dawdle":
            time.sleep(self._dawdle)
        outcome = self._runner.run(plan)
        if fault == "fail late":  # the states have gained what nobody will hear of
            raise RuntimeError(INJECTED)
        if fault == "memory":
            raise OutOfMemory(INJECTED)
        return self._spoil(outcome) if fault == "not finite" else outcome

    def _draw(self) -> str | None:
        point = self._chance.random()
        for fault, odds in self._odds.items():
            point -= odds
            if point < 0:
                return fault
        return None

    def _spoil(self, outcome: Outcome) -> Outcome:
        """One row's logits were not finite."""
        drawn = list(outcome.drawn)
        rows = [row for row, token in enumerate(drawn) if token is not None]
        if rows:
            drawn[self._chance.choice(rows)] = None
        return Outcome(drawn)


def load_faulty(seed: int, often: float, made: Callable[[FaultyRunner], None]) -> Callable[..., LoadedEngine]:
    """A way to load an engine whose runner is faulty; `made` is called with it."""

    def load(chosen: settings.Settings, path: Path) -> LoadedEngine:
        engine = load_engine(chosen, path)
        runner = FaultyRunner(engine.runner, seed, often)
        made(runner)
        return replace(engine, runner=runner)

    return load


def take_census(file: Path, made: Counter[str]) -> None:
    """What lives, by type, of all that came after the start: the runtime has frozen what was there before."""
    gc.collect()
    live = Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({"live": live, "tasks": len(asyncio.all_tasks()), "made": made}))
    unfinished.replace(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--often", type=float, default=1.0, help="a factor to the odds of all faults; 0 is never")
    parser.add_argument("--census", type=Path, required=True, help="the file for the census")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="any option of the server")
    chosen = parser.parse_args(arguments)
    overrides = [(option, value) for option, _, value in (text.partition("=") for text in chosen.set)]
    resolved = settings.load(None, overrides)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    runners: list[FaultyRunner] = []

    def on_ready(url: str, model: str) -> None:
        census = partial(take_census, chosen.census, runners[0].made)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, census)
        print(url, flush=True)

    uvloop.run(serve(resolved.settings, on_ready, load_faulty(chosen.seed, chosen.often, runners.append)))


if __name__ == "__main__":
    main()
