"""Plays loads against a model of step time on a virtual clock, with the scheduler as it is and with simpler ones.

    python -m benchmarks.simulate                           # 100,000 requests of a generated load
    python -m benchmarks.simulate --trace trace.jsonl       # what a server with scheduler.trace_file was asked
    python -m benchmarks.simulate --requests 2000 --load 0.9 --out /tmp

Policies: `fair` is the server's. `fcfs` serves in order of arrival, and shares and suspends nothing. `static` also
waits for a whole batch to end before the next begins. Prints JSON, and writes it with a plot to --out.

In a generated load one key asks for most, in bursts, and others for little; many prompts begin with one of a few stems.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence as Many
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bdh_batch.engine.trace import BLOCK
from bdh_batch.messages import Delta, Outcome, SamplingParams
from bdh_batch.scheduler.scheduler import Policy, Scheduler
from bdh_batch.scheduler.sequence import Sequence

POLICIES = ("fair", "fcfs", "static")
GOOD = 5.0  # seconds to the first token within which an answer counts for goodput
PARAMS = SamplingParams()


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and of what it does."""

    step: float = 0.001
    decode: float = 0.0003
    prefill: float = 0.0001
    copy: float = 0.0005

    def of(self, decodes: int, prefill_tokens: int, copies: int) -> float:
        return self.step + self.decode * decodes + self.prefill * prefill_tokens + self.copy * copies


@dataclass(frozen=True)
class Request:
    at: float
    tenant: str
    priority: int
    prompt: Many[int]
    answer: int  # tokens


class Silent:
    """No text, and no client."""

    stopped = False
    held = ""
    unfinished = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def put(self, index: int, delta: Delta) -> None:
        pass


def generate(count: int, load: float, cost: Cost, slots: int, seed: int) -> list[Request]:
    """A load that is `load` times what full batches without any sharing could carry."""
    draw = random.Random(seed)
    stems = [[draw.randrange(256) for _ in range(draw.choice((64, 200, 600)))] for _ in range(20)]
    prompt, answer = 180, 40
    each = prompt * cost.prefill + answer * (cost.decode + cost.step / slots)
    rate, now, requests = load / each, 0.0, []
    for number in range(count):
        burst = number // 1000 % 4 == 0
        now += draw.expovariate(rate * (2.0 if burst else 0.8))
        key = "flood" if draw.random() < (0.95 if burst else 0.5) else f"key {draw.randrange(20)}"
        tail = [draw.randrange(256) for _ in range(1 + int(draw.expovariate(1 / 60)))]
        stem = draw.choice(stems) if draw.random() < 0.5 else []
        length = 1 + int(draw.expovariate(1 / answer))
        requests.append(Request(now, key, 0, [*stem, *tail], length))
    return requests


def replay(file: Path) -> list[Request]:
    """The requests of a trace. Their tokens are made up, such that they begin alike where those of the trace did."""
    events = [json.loads(line) for line in file.read_text().splitlines()]
    answers = {event["place"]: event["generated"] for event in events if event["event"] == "end"}
    submitted = [event for event in events if event["event"] == "submit" and answers.get(event["place"])]
    begin = submitted[0]["now"] if submitted else 0.0
    return [
        Request(event["now"] - begin, event["tenant"], event["priority"], _tokens(event), answers[event["place"]])
        for event in submitted
    ]


def _tokens(event: Mapping[str, object]) -> list[int]:
    blocks, length = event["prompt"], event["prompt_tokens"]
    assert isinstance(blocks, list)
    assert isinstance(length, int)
    return [int(block, 16) + at & 0xFFFFFFFF for block in blocks for at in range(BLOCK)][:length]


def simulate(name: str, requests: Many[Request], cost: Cost, slots: int, prefill: int, host: int) -> dict[str, object]:
    """Runs all of `requests` under one policy."""
    fair = name == "fair"
    policy = Policy(host, target_step=0.03, keep=True) if fair else Policy(min_shared=1 << 30)
    scheduler = Scheduler(slots, prefill, policy)
    arrivals = iter(requests)
    upcoming, now, began = next(arrivals, None), 0.0, time.perf_counter()
    sequences: list[Sequence] = []
    computed = 0
    while upcoming is not None or scheduler.has_work:
        batch_open = name != "static" or not scheduler.has_work
        taken = 0
        while upcoming is not None and upcoming.at <= now and batch_open and (fair or name == "fcfs" or taken < slots):
            sequence = _sequence(upcoming, fair)
            sequences.append(sequence)
            scheduler.submit([sequence])
            upcoming, taken = next(arrivals, None), taken + 1
        step = scheduler.plan(now)
        if step is None:
            assert upcoming is not None
            now = max(now, upcoming.at)
            continue
        now += cost.of(step.decodes, step.prefill_tokens, len(step.plan.copies))
        computed += step.prefill_tokens
        scheduler.commit(step, Outcome([1 if s.sampling else None for s in step.plan.segments]), now)
    scheduler.check()
    keys = [request.tenant for request in requests]
    return figures(sequences, keys, now) | {
        "prompt_tokens_computed": computed,
        "preemptions": scheduler.counts.preemptions,
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


def _sequence(request: Request, fair: bool) -> Sequence:
    silent = Silent()
    return Sequence(
        id="",
        prompt=request.prompt,
        max_tokens=request.answer,
        sampling=PARAMS,
        text=silent,
        outbox=silent,
        arrived=request.at,
        key=request.tenant if fair else "",
        tenant=request.tenant if fair else "",
        priority=request.priority if fair else 0,
    )


def figures(sequences: Many[Sequence], keys: Many[str], seconds: float) -> dict[str, object]:
    waits = [s.first_token - s.arrived for s in sequences if s.first_token is not None]
    assert len(waits) == len(sequences), "every request was answered"
    by_key = defaultdict(list)
    for key, wait in zip(keys, waits, strict=True):
        by_key[key].append(wait)
    good = sum(len(s.generated) for s, wait in zip(sequences, waits, strict=True) if wait <= GOOD)
    greedy = max(by_key, key=lambda key: len(by_key[key]))
    small = [wait for key, line in by_key.items() if key != greedy for wait in line]
    return {
        "seconds": round(seconds, 1),
        "tokens_per_s": round(sum(len(s.generated) for s in sequences) / seconds, 1),
        "goodput_tokens_per_s": round(good / seconds, 1),
        "first_token_s": quantiles(waits),
        "first_token_s_of_small_keys": quantiles(small or waits),
        "mean_wait_of_small_keys_over_greedy": round(mean(small or waits) / mean(by_key[greedy]), 3),
    }


def mean(values: Many[float]) -> float:
    return sum(values) / len(values)


def quantiles(values: Many[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": round(ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))], 4) for q in (50, 90, 99)}


def plot(report: Mapping[str, Mapping[str, object]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        "first_token_s",
        "first_token_s_of_small_keys",
        "mean_wait_of_small_keys_over_greedy",
        "goodput_tokens_per_s",
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 4))
    for axis, panel in zip(axes, panels, strict=True):
        values = [report[name][panel] for name in report]
        bars = [value["p99"] if isinstance(value, dict) else value for value in values]
        axis.bar(list(report), bars)
        axis.set_title(f"{panel}{', p99' if isinstance(values[0], dict) else ''}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a file of scheduler.trace_file, instead of a generated load")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--load", type=float, default=0.95, help="of what full batches could carry")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--host", type=int, default=64, help="slots in host memory, for the server's policy")
    parser.add_argument("--prefill", type=int, default=256, help="most prompt tokens in a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON and the plot")
    return parser.parse_args()


def in_order(requests: Many[Request]) -> Iterator[Request]:
    yield from sorted(requests, key=lambda request: request.at)


def main() -> None:
    chosen, cost = parse(), Cost()
    if chosen.trace is not None:
        requests = replay(chosen.trace)
    else:
        requests = generate(chosen.requests, chosen.load, cost, chosen.slots, chosen.seed)
    requests = [replace(request, at=max(0.0, request.at)) for request in in_order(requests)]
    policies = {}
    for name in POLICIES:
        policies[name] = simulate(name, requests, cost, chosen.slots, chosen.prefill, chosen.host)
        print(name, json.dumps(policies[name]), file=sys.stderr)
    assert all(math.isfinite(float(str(result["seconds"]))) for result in policies.values())
    report = {
        "command": f"python -m benchmarks.simulate {' '.join(sys.argv[1:])}".strip(),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "requests": len(requests),
        "cost": asdict(cost),
        "policies": policies,
    }
    (chosen.out / "simulate.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(policies, chosen.out / "simulate.png")


if __name__ == "__main__":
    main()
