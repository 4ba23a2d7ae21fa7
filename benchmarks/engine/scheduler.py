"""What a step costs beside its computing: planning it, committing it, publishing it to mailboxes.

    python -m benchmarks.engine.scheduler  # 1,024 running sequences
    python -m benchmarks.engine.scheduler --running 256 --waiting 0

Nothing is computed: tokens come from a list. What is measured is Python in one thread, as the worker runs it. Figures
are milliseconds a step: the median, and the 99th percentile; `figure` has the median of all of it by blocks of steps.
Writes `scheduler.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from bdh_batch.engine.completion import Completion
from bdh_batch.engine.mailbox import Mailbox
from bdh_batch.engine.worker import Worker
from bdh_batch.messages import Outcome, SamplingParams
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer
from benchmarks.common import figure
from benchmarks.report import report_head, results_folder, write_report

SCENARIOS = ("decoding", "decoding, a queue behind", "taking turns", "prompts under way", "coming and going")
WARM = 100  # steps before those that count
CHURN = 16  # sequences that end in a step, and as many that come, where they come and go
BLOCKS = 10  # of steps: a figure's rounds
CACHED = 256  # states on the device beside those of running sequences


class NoRunner:
    def run(self, plan: object) -> Outcome:
        raise NotImplementedError("nothing is computed here")


def make_scheduler(scenario: str, running: int, waiting: int) -> Scheduler:
    turns = scenario == "taking turns"
    policy = Policy(
        host_slots=running if turns else 0,
        max_running=running * 3 // 2 if turns else running,
        cache_prefixes=True,
        time_slice=64,
    )
    scheduler = Scheduler(running + (CACHED if scenario == "coming and going" else 0), 4 * running, policy)
    behind = {"decoding": 0, "taking turns": running // 2, "coming and going": -running}.get(scenario, waiting)
    length = 20_000 if scenario == "prompts under way" else 24
    for number in range(running + behind):
        prompt = [number % 251, number // 251, *([7] * length)]
        scheduler.submit([make_sequence(number, prompt if number % 8 == 0 else prompt[:3], 10**9)])
    return scheduler


def make_sequence(number: int, prompt: list[int], max_tokens: int) -> Sequence:
    return Sequence(
        id=str(number),
        completion=Completion(prompt, max_tokens, SamplingParams(), TextStream(ByteTokenizer().decoder())),
        client=Client(Mailbox()),
        prefix=Prefix(f"key {number % 16}"),
        tenant=f"key {number % 16}",
    )


def newcomers(draw: random.Random, number: int, running: int) -> list[Sequence]:
    """Prompts of some hundred tokens, each with one of a few prefixes, and completions that end as many others come."""
    lengths = (draw.randrange(running // CHURN // 2, running // CHURN * 3 // 2) for _ in range(CHURN))
    return [
        make_sequence(number + at, [draw.randrange(8)] * 200 + draw.choices(range(256), k=100), length)
        for at, length in enumerate(lengths)
    ]


async def measure(scenario: str, running: int, waiting: int, steps: int) -> dict[str, dict[str, Any]]:
    scheduler = make_scheduler(scenario, running, waiting)
    worker = Worker(Scheduler(1, 1), NoRunner(), EngineMetrics(CollectorRegistry(), "none"), 1)
    draw, churn = random.Random(1), scenario == "coming and going"
    times: dict[str, list[float]] = {"plan": [], "commit": [], "publish": [], "deliver": []}
    gc.collect()
    gc.freeze()
    for number in range(steps + WARM):
        if churn:
            scheduler.submit(newcomers(draw, number * CHURN, running))
        marks = [time.perf_counter()]
        step = scheduler.plan(marks[0])
        assert step is not None
        marks.append(time.perf_counter())
        outcome = Outcome([97 if segment.sampling else None for segment in step.plan.segments])
        began = time.perf_counter()
        updates = scheduler.commit(step, outcome, began)
        marks.append(time.perf_counter())
        worker._publish(updates)
        marks.append(time.perf_counter())
        await asyncio.sleep(0)  # the event loop puts the deltas into their mailboxes
        marks.append(time.perf_counter())
        for sequence, _ in updates:
            assert isinstance(sequence.client.outbox, Mailbox)
            await sequence.client.outbox.take()  # as its client would
        if number >= WARM:
            for name, seconds in zip(
                times, (marks[1] - marks[0], marks[2] - began, marks[3] - marks[2], marks[4] - marks[3])
            ):
                times[name].append(1000 * seconds)
    worker.close()
    times["all"] = [sum(parts) for parts in zip(*times.values())]
    share = len(times["all"]) // BLOCKS
    blocks = [statistics.median(times["all"][block * share : (block + 1) * share]) for block in range(BLOCKS)]
    return {
        **{name: figures(values) for name, values in times.items()},
        "figure": figure(blocks, "ms a step", "lower"),
    }


def figures(values: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(values), 3),
        "p99_ms": round(sorted(values)[math.ceil(0.99 * len(values)) - 1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=1024, help="sequences in a step")
    parser.add_argument("--waiting", type=int, default=2048, help="sequences in the queue, where there is one")
    parser.add_argument("--steps", type=int, default=300, help="steps of each scenario")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args()
    if chosen.steps < BLOCKS:
        parser.error(f"--steps should be at least {BLOCKS}")
    head = report_head(["torch"])
    scenarios = {}
    for scenario in SCENARIOS:
        scenarios[scenario] = asyncio.run(measure(scenario, chosen.running, chosen.waiting, chosen.steps))
        print(scenario, json.dumps(scenarios[scenario]), file=sys.stderr)
    report = {
        **head,
        "running": chosen.running,
        "waiting": chosen.waiting,
        "steps": chosen.steps,
        "milliseconds_a_step": scenarios,
    }
    write_report(chosen.out / "scheduler.json", report)


if __name__ == "__main__":
    main()
