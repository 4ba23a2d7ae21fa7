"""Plays loads against a model of step time on a virtual clock, with the scheduler as it is and with simpler ones.

    python -m benchmarks.engine.simulate                      # 100,000 requests of a generated load, and all scenarios
    python -m benchmarks.engine.simulate --against ../before  # the same with that of another checkout beside it
    python -m benchmarks.engine.simulate --without            # and what fails without each of the scheduler's guards
    python -m benchmarks.engine.simulate --trace trace.jsonl  # what a server with scheduler.trace_file was asked
    python -m benchmarks.engine.simulate --requests 2000 --load 0.9 --out /tmp

Policies: `fair` is the server's, and `before` that of the other checkout. `fcfs` serves in order of arrival, and shares
and preempts nothing. `static` also waits for a whole batch to end before the next begins. Prints JSON, and writes it
with a plot to --out.

In a generated load one tenant asks for most, in bursts, and others for little; many prompts begin with one of a few
stems. The scenarios are a lone tenant beside a flood, two floods, and a long prompt beside streams, with the costs of a
step on two cores of a CPU. Nothing here depends on how fast the machine is, but for `wall_seconds`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence as Many
from dataclasses import asdict, replace
from pathlib import Path

from bdh_batch.engine.trace import BLOCK
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from benchmarks import ROOT
from benchmarks.engine.play import Cost, Play, Request, Response, mean, quantiles
from benchmarks.engine.scenarios import CPU, GUARDED, TARGET, play_scenarios, play_without
from benchmarks.report import report_head, results_folder, write_report

POLICIES = ("fair", "fcfs", "static")
GOOD = 5.0  # seconds to the first token within which a response counts for goodput


# A generated load, or a recorded one


def generate(count: int, load: float, cost: Cost, slots: int, seed: int) -> list[Request]:
    """A load that is `load` times what full batches without any sharing could carry."""
    draw = random.Random(seed)
    stems = [[draw.randrange(256) for _ in range(draw.choice((64, 200, 600)))] for _ in range(20)]
    prompt, completion = 180, 40
    each = prompt * cost.prefill + completion * (cost.decode + cost.step / slots)
    rate, now, requests = load / each, 0.0, []
    for number in range(count):
        burst = number // 1000 % 4 == 0
        now += draw.expovariate(rate * (2.0 if burst else 0.8))
        key = "flood" if draw.random() < (0.95 if burst else 0.5) else f"key {draw.randrange(20)}"
        tail = [draw.randrange(256) for _ in range(1 + int(draw.expovariate(1 / 60)))]
        stem = draw.choice(stems) if draw.random() < 0.5 else []
        length = 1 + int(draw.expovariate(1 / completion))
        requests.append(Request(now, key, 0, [*stem, *tail], length))
    return requests


def replay(file: Path) -> list[Request]:
    """The requests of a trace. Their tokens are made up, such that they begin alike where those of the trace did."""
    events = [json.loads(line) for line in file.read_text().splitlines()]
    lengths = {event["place"]: event["generated"] for event in events if event["event"] == "end"}
    submitted = [event for event in events if event["event"] == "submit" and lengths.get(event["place"])]
    begin = submitted[0]["now"] if submitted else 0.0
    return [
        Request(event["now"] - begin, event["tenant"], event["priority"], _tokens(event), lengths[event["place"]])
        for event in submitted
    ]


def _tokens(event: Mapping[str, object]) -> list[int]:
    blocks, length = event["prompt"], event["prompt_tokens"]
    assert isinstance(blocks, list)
    assert isinstance(length, int)
    return [int(block, 16) + at & 0x7FFFFFFF for block in blocks for at in range(BLOCK)][:length]


def simulate(name: str, requests: Many[Request], cost: Cost, slots: int, prefill: int, host: int) -> dict[str, object]:
    """Runs all of `requests` under one policy."""
    fair = name == "fair"
    policy = Policy(host, target_step=0.03, cache_prefixes=True) if fair else Policy(min_shared=1 << 30)
    play = Play(Scheduler(slots, prefill, policy), cost, fair, slots if name == "static" else None)
    began = time.perf_counter()
    for request in requests:
        play.ask(request)
    play.run()
    check_invariants(play.scheduler)
    assert all(response.ended for response in play.responses), "every request was answered"
    return figures(play.responses, play.now) | {
        "prompt_tokens_computed": play.computed,
        "preemptions": play.scheduler.counts.preemptions,
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


def figures(responses: Many[Response], seconds: float) -> dict[str, object]:
    by_tenant = defaultdict(list)
    for response in responses:
        by_tenant[response.request.tenant].append(response.wait)
    waits = [response.wait for response in responses]
    good = sum(len(response.times) for response in responses if response.wait <= GOOD)
    greedy = max(by_tenant, key=lambda tenant: len(by_tenant[tenant]))
    small = [wait for tenant, waits in by_tenant.items() if tenant != greedy for wait in waits]
    return {
        "seconds": round(seconds, 1),
        "tokens_per_s": round(sum(len(response.times) for response in responses) / seconds, 1),
        "goodput_tokens_per_s": round(good / seconds, 1),
        "first_token_s": quantiles(waits),
        "first_token_s_of_small_keys": quantiles(small or waits),
        "mean_wait_of_small_keys_over_greedy": round(mean(small or waits) / mean(by_tenant[greedy]), 3),
    }


# The command


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


def parse(argv: Many[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a file of scheduler.trace_file, instead of a generated load")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--load", type=float, default=0.95, help="of what full batches could carry")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--host", type=int, default=64, help="slots in host memory, for the server's policy")
    parser.add_argument("--prefill", type=int, default=256, help="most prompt tokens in a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--against", type=Path, help="another checkout, whose scheduler is played beside this one's")
    text = "guards of the scheduler, all if none is named: plays the scenarios that are worse without them"
    parser.add_argument("--without", nargs="*", choices=GUARDED, metavar="GUARD", help=text)
    parser.add_argument("--print-only", action="store_true", help="write no files; the report goes to stdout")
    parser.add_argument("--out", type=Path, default=results_folder(), help="folder for the JSON and the plot")
    return parser.parse_args(argv)


def in_order(requests: Many[Request]) -> Iterator[Request]:
    yield from sorted(requests, key=lambda request: request.at)


def measure(chosen: argparse.Namespace) -> dict[str, dict[str, dict[str, object]]]:
    cost = Cost()
    if chosen.trace is not None:
        requests = replay(chosen.trace)
    else:
        requests = generate(chosen.requests, chosen.load, cost, chosen.slots, chosen.seed)
    requests = [replace(request, at=max(0.0, request.at)) for request in in_order(requests)]
    found = {}
    for name in chosen.policies:
        found[name] = simulate(name, requests, cost, chosen.slots, chosen.prefill, chosen.host)
        print(name, json.dumps(found[name]), file=sys.stderr)
    assert all(math.isfinite(float(str(result["seconds"]))) for result in found.values())
    return {"policies": found, "scenarios": play_scenarios()}


def measure_other(checkout: Path, argv: Many[str]) -> dict[str, dict[str, dict[str, object]]]:
    """What these benchmarks say of the scheduler of `checkout`: run where that one's package lies beside them."""
    kept = [each for at, each in enumerate(argv) if each != "--against" and (not at or argv[at - 1] != "--against")]
    command = [sys.executable, "-P", "-m", "benchmarks.engine.simulate", *kept, "--policies", "fair", "--print-only"]
    with tempfile.TemporaryDirectory() as folder:
        for name, source in {"bdh_batch": checkout, "benchmarks": ROOT}.items():
            Path(folder, name).symlink_to(source.resolve() / name)
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    report: dict[str, dict[str, dict[str, object]]] = json.loads(done.stdout)
    return report


def main(argv: Many[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    chosen = parse(argv)
    head = report_head([])
    measured = measure(chosen)
    if chosen.print_only:
        json.dump(measured, sys.stdout)
        return
    policies, schedulers = measured["policies"], {"fair": measured["scenarios"]}
    if chosen.without is not None:
        for guard in chosen.without or GUARDED:
            schedulers[f"without {guard}"] = play_without(guard)
    if chosen.against is not None:
        before = measure_other(chosen.against, argv)
        policies["before"], schedulers["before"] = before["policies"]["fair"], before["scenarios"]
    report = {
        **head,
        "requests": chosen.requests if chosen.trace is None else str(chosen.trace),
        "cost": asdict(Cost()),
        "policies": policies,
        "scenarios": {"cost": asdict(CPU), "target_step_s": TARGET, **schedulers},
    }
    write_report(chosen.out / "simulate.json", report)
    plot(policies, chosen.out / "simulate.png")


if __name__ == "__main__":
    main()
