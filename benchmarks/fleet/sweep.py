"""Plays fleets of many sizes on a virtual clock: waits and recomputed tokens by size, failure rate and routing rule.

    python -m benchmarks.fleet.sweep                    # all, up to 2,048 replicas
    python -m benchmarks.fleet.sweep --only sizes --largest 512
    python -m benchmarks.fleet.page                     # writes and draws it

Every replica has the server's own scheduler with its default options, and every ingress process the server's own
failover and, but for the other rules, routing. Steps take what `bdh-batch plan --gpu cpu` reckons for upstream's
default model (25M parameters) on the machine of --results. Nothing here depends on how fast this machine is, but for
`processor_seconds`. Writes `fleet.json`, fleet by fleet:

    sizes       by routing rule and number of replicas
    failures    by routing rule and failures of a replica an hour
    detection   by the seconds until a lost engine is known to be lost
    ingresses   by ingress processes, where a conversation stays with one and where each turn comes to any

The first seconds of a fleet, in which its caches fill, are in no figure but those of lost work. The larger a fleet, the
shorter its time, as what is played is bounded.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bdh_batch.backends import failover
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.plan.costs import Load
from bdh_batch.plan.machines import measured
from bdh_batch.plan.sizing import Planner
from bdh_batch.settings import Settings
from benchmarks.fleet.engine import Engine, Planned, scheduler_of
from benchmarks.fleet.fleet import Fleet, play
from benchmarks.fleet.load import Chats
from benchmarks.fleet.streams import RULES
from benchmarks.report import RESULTS, load_json, report_head, results_folder, write_report

SIZES = (1, 8, 64, 512, 2048)
FAILURES = (0.0, 6.0, 18.0, 36.0)
DETECTION = (0.05, 1.0, 5.0)  # a process that ends is known at once; a machine after engine.heartbeat_seconds
INGRESSES = (1, 4, 16)
MIDDLE, MIDDLE_REQUESTS = 128, 8000  # replicas, where these do not vary, and requests of these fleets
CHATS = Chats(pause=2.0, answer=32)
SLOTS = 64
BATCH = 8  # streams, by whose step the load is reckoned
WARM, LEAST_SECONDS, REQUESTS = 15.0, 25.0, 4000
MEMORY = 16e9  # bytes of a replica
SECTIONS = ("failures", "detection", "ingresses", "sizes")


class Model:
    """Makes engines of upstream's default model on a machine, and reckons what they can carry."""

    def __init__(self, results: Path) -> None:
        machine, self.config = measured(results, MEMORY), BDHConfig()
        self.basis = machine.basis
        self._planner = Planner(self.config, machine, Load())
        # A copy reads and writes; the machine's rate counts both.
        self._costs = Planned(self._planner, machine.bandwidth / 2)

    def engine(self) -> Engine:
        scheduler = scheduler_of(Settings(), self.config, SLOTS, self._planner.costs.state_bytes)
        return Engine(scheduler, self._costs)

    @property
    def request_seconds(self) -> float:
        """Of one engine's time that a request takes, where nothing is cached."""
        prompt, step = sum(self._planner.prompt().values()), sum(self._planner.step(BATCH).values())
        return CHATS.prompt_tokens * prompt + CHATS.answer * step / BATCH

    @property
    def figures(self) -> Mapping[str, Any]:
        return {
            "basis": self.basis,
            "config": self.config.to_dict(),
            "state_bytes": self._planner.costs.state_bytes,
            "step_s": {streams: sum(self._planner.step(streams).values()) for streams in (1, 2, 4, 8, 16)},
            "prompt_token_s": sum(self._planner.prompt().values()),
            "request_s": self.request_seconds,
        }


class Sweep:
    """Plays fleets of one model.

    Args:
        load: of what the engines could carry if nothing were cached.
        largest: replicas.
    """

    def __init__(self, model: Model, load: float, largest: int) -> None:
        self._model, self._load, self._largest = model, load, largest

    def fleet(self, replicas: int, requests: int = REQUESTS, **other: Any) -> Fleet:
        rate = self._load * replicas / self._model.request_seconds
        seconds = WARM + max(LEAST_SECONDS, requests / rate)
        return Fleet(replicas, rate, seconds, WARM, chats=CHATS, **other)

    def middle(self, **other: Any) -> Fleet:
        return self.fleet(min(MIDDLE, self._largest), MIDDLE_REQUESTS, **other)

    def play(self, fleet: Fleet) -> dict[str, Any]:
        given = {name: value for name, value in asdict(fleet).items() if name != "chats"}
        found = {**given, **play(fleet, self._model.engine)}
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    def sizes(self) -> Iterator[Fleet]:
        for size in (size for size in SIZES if size <= self._largest):
            yield from (self.fleet(size, rule=rule, failures_per_hour=2.0) for rule in RULES)

    def failures(self) -> Iterator[Fleet]:
        for failures in FAILURES:
            yield from (self.middle(rule=rule, failures_per_hour=failures) for rule in RULES)

    def detection(self) -> Iterator[Fleet]:
        yield from (self.middle(failures_per_hour=6.0, detected=seconds) for seconds in DETECTION)

    def ingresses(self) -> Iterator[Fleet]:
        for ingresses in INGRESSES:
            for sticky in (True, False) if ingresses > 1 else (True,):
                yield self.middle(ingresses=ingresses, sticky=sticky)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.fleet.sweep",
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="replicas of the largest fleet")
    parser.add_argument("--load", type=float, default=0.7, help="of what the engines could carry without any cache")
    parser.add_argument("--results", type=Path, default=RESULTS / "amd-epyc-2-threads", help="of the machine")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    logging.getLogger(failover.__name__).setLevel(logging.CRITICAL)  # it tells of every resumed request
    model = Model(chosen.results)
    sweep = Sweep(model, chosen.load, chosen.largest)
    head = report_head(["msgspec"])
    about = {**head, "load": chosen.load, "chats": asdict(CHATS), "slots": SLOTS, "model": model.figures}
    file = chosen.out / "fleet.json"
    for name in chosen.only:
        played = []
        for fleet in getattr(sweep, name)():
            played.append(sweep.play(fleet))
            write_report(file, {**load_json(file), name: {**about, "fleets": played}})


if __name__ == "__main__":
    main()
