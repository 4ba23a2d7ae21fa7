"""Where the time of a decode step goes: the kernels, and all that is done around them.

    python -m benchmarks.engine.step                     # the bundled model, batches of 1, 8 and 64
    python -m benchmarks.engine.step --against ../before  # beside the engine of another checkout, by turns

A step is planned, computed, committed and published in one thread, as the worker does it, for sequences that all decode
with `temperature` 0.8; `filtered` ones have a top_k, a top_p and a min_p, too. Figures are microseconds a step: the
median of its steps in each round, and each round is a process of its own. `forward` and `logits` are the kernels',
`run` is what the runner does beside them, drawing included, and `around` is all but `forward`. What the event loop
does with the deltas is not in it. Writes `step.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence as Many
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from bdh_batch import settings
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.loading import LoadedEngine, load_engine, scheduler_for
from bdh_batch.engine.mailbox import Mailbox
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.worker import Worker
from bdh_batch.messages import Outcome, Plan, SamplingParams
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.processes.model_settings import bundled_model
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer
from benchmarks import ROOT
from benchmarks.common import figure
from benchmarks.report import report_head, results_folder, write_report

WARM = 50  # steps before those that count
TENANTS = 16
KINDS = {
    "plain": SamplingParams(temperature=0.8),
    "filtered": SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02),
}
Times = defaultdict[str, list[float]]


class NoRunner:
    """The worker that publishes computes nothing: the steps are made here."""

    def run(self, plan: Plan) -> Outcome:
        raise NotImplementedError("nothing is computed here")


def timed(times: Times, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = function(*arguments)
        times[name].append(time.perf_counter() - began)
        return found

    return run


def make_sequence(number: int, params: SamplingParams) -> Sequence:
    return Sequence(
        id=str(number),
        completion=Completion([65 + number % 20] * 24, 10**9, params, TextStream(ByteTokenizer().decoder())),
        client=Client(Mailbox()),
        prefix=Prefix("x"),
        tenant=f"key {number % TENANTS}",
    )


async def measure(chosen: settings.Settings, engine: LoadedEngine, batch: int, kind: str, steps: int) -> Times:
    """The seconds of each part of each step."""
    times: Times = defaultdict(list)
    scheduler, runner = scheduler_for(chosen, engine), engine.runner
    assert isinstance(runner, Runner)
    kernels = runner._kernels
    plain = kernels.forward, kernels.logits
    kernels.forward = timed(times, "forward", plain[0])  # type: ignore[method-assign]
    kernels.logits = timed(times, "logits", plain[1])  # type: ignore[method-assign]
    worker = Worker(scheduler_for(chosen, engine), NoRunner(), EngineMetrics(CollectorRegistry(), "none"), 1)
    sequences = [make_sequence(number, KINDS[kind]) for number in range(batch)]
    scheduler.submit(sequences)
    gc.collect()
    gc.freeze()
    for number in range(WARM + steps):
        if number == WARM:
            times.clear()
        marks = [time.perf_counter()]
        scheduler.expire(marks[0])
        step = scheduler.plan(marks[0])
        assert step is not None
        marks.append(time.perf_counter())
        outcome = runner.run(step.plan)
        marks.append(time.perf_counter())
        updates = scheduler.commit(step, outcome, marks[-1])
        marks.append(time.perf_counter())
        worker._observer.stepped(step, marks[2] - marks[1])
        worker._publish(updates)
        worker._count()
        marks.append(time.perf_counter())
        for name, begin, end in zip(("plan", "run", "commit", "publish"), marks, marks[1:]):
            times[name].append(end - begin)
        times["all"].append(marks[-1] - marks[0])
        await asyncio.sleep(0)  # the event loop puts the deltas into their mailboxes
        for sequence, _ in updates:  # a step may have no time for all
            assert isinstance(sequence.client.outbox, Mailbox)
            await sequence.client.outbox.take()
    worker.close()
    kernels.forward, kernels.logits = plain  # type: ignore[method-assign]
    return times


def parts(times: Times) -> dict[str, float]:
    """Microseconds of each part: medians of steps."""
    times["run"] = [a - b - c for a, b, c in zip(times["run"], times["forward"], times["logits"], strict=True)]
    times["around"] = [a - b for a, b in zip(times["all"], times["forward"], strict=True)]
    return {name: round(1e6 * statistics.median(seconds), 2) for name, seconds in times.items()}


def one_round(batches: Many[int], steps: int) -> dict[str, dict[str, float]]:
    """The parts of a step of each batch and kind."""
    chosen = settings.load(None, [("model.path", str(bundled_model()))]).settings
    engine = load_engine(chosen, bundled_model())
    getattr(engine, "begin", lambda: None)()  # as the worker's thread does; an older checkout's does not
    return {
        f"{batch} {kind}": parts(asyncio.run(measure(chosen, engine, batch, kind, max(20, steps // batch))))
        for batch in batches
        for kind in KINDS
    }


def round_of(checkout: Path, batches: Many[int], steps: int) -> dict[str, dict[str, float]]:
    """A round in a process of its own, with this benchmark and the package of `checkout`."""
    sizes = ["--batches", *map(str, batches), "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        for name, source in {"bdh_batch": checkout, "benchmarks": ROOT}.items():
            Path(folder, name).symlink_to(source.resolve() / name)
        Path(folder, "models").symlink_to(checkout.resolve() / "models")
        command = [sys.executable, "-P", "-m", "benchmarks.engine.step", *sizes, "--print-only"]
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def summary(rounds: Many[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Of each batch and kind: the medians of its parts, and the rounds of what is done around the forward pass."""
    return {
        name: {
            "us": {part: round(statistics.median(each[name][part] for each in rounds), 2) for part in first},
            "around": figure([each[name]["around"] for each in rounds], "µs a step", "lower"),
            "all": figure([each[name]["all"] for each in rounds], "µs a step", "lower"),
        }
        for name, first in rounds[0].items()
    }


def main(arguments: Many[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=3000, help="of a batch of 1; of larger ones fewer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, whose engine is measured beside this one's")
    parser.add_argument("--print-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(arguments)
    if chosen.print_only:
        print(json.dumps(one_round(chosen.batches, chosen.steps)), flush=True)
        os._exit(0)  # not under the feet of an engine's threads
    head = report_head(["torch", "numba"])
    checkouts = {"now": ROOT, **({} if chosen.against is None else {"before": chosen.against})}
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in checkouts}
    for _ in range(chosen.rounds):
        for name, checkout in checkouts.items():
            found[name].append(round_of(checkout, chosen.batches, chosen.steps))
    report = {name: summary(rounds) for name, rounds in found.items()}
    for name, batches in report.items():
        for batch, each in batches.items():
            print(f"{name:8}{batch:14}", "  ".join(f"{part} {value:.0f}" for part, value in each["us"].items()))
    write_report(chosen.out / "step.json", head | {"rounds": chosen.rounds, "steps": chosen.steps} | report)


if __name__ == "__main__":
    main()
