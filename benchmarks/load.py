"""Load from locust on a server of its own, up to its saturation and beyond, and what becomes of it there.

    python -m benchmarks.load                                         # 10 minutes; `make load SECONDS=60 USERS=96`
    python -m benchmarks.load --url http://127.0.0.1:8000 --pid 4711  # a server that runs; without --pid no memory

The users of `locustfile.py` come in stages, the last of which are more than the server has room for: it runs so many
sequences at once, lets as many again wait, and refuses the rest. Leaves locust's report (`load.html`), its CSV
(`load_*.csv`) and `load.json`: tokens/s and memory by stage, failures by kind, and the verdicts

    no_failures      nothing failed; a refusal (429) is no failure
    throughput_flat  the last stage's tokens/s are not far below the mean of those before it, from the first on that
                     came near the best; null: never saturated. The lowest to the best, told beside it, is much a matter
                     of the machine's noise. The tokens of prompts count too: how many answers a stage has left for is
                     much a matter of chance, as some prompts are long
    memory_flat      medians of the memory in both halves of that time; null: never saturated, or memory not seen

Ends with exit code 1 where one of them is false.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.client import served
from benchmarks.common import report_head, write_json

ROOT = Path(__file__).parents[1]
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the users, by stage
SETTLING = 0.2  # of a stage, which is not measured: users come, and the queue fills or empties
NEAR, FAR = 0.95, 0.9  # of the best stage's tokens/s, which is saturated; of the mean, which is fallen
GROWTH = 0.02  # of the memory, that is no leak yet
RATES = ("tokens", "prompt_tokens", "answers", "refused")
KEYS = ("load-1", "load-2", "load-3")
SERVER = (
    "scheduler.max_running=64",
    "scheduler.max_queued_requests=64",
    "engine.state_memory=3 GiB",
    "auth.enabled=true",
)
FILE = "load.json"
Figures = dict[str, Any]
Stage = tuple[int, float, float]  # users, from and to second


def stages_of(users: int, seconds: float) -> list[Stage]:
    """As long as each other, each with more users than the one before."""
    numbers = sorted({max(1, round(share * users)) for share in SHARES})
    each = seconds / len(numbers)
    return [(number, i * each, (i + 1) * each) for i, number in enumerate(numbers)]


def settled(stage: Stage) -> float:
    """The second from which it is measured."""
    _, begin, end = stage
    return begin + SETTLING * (end - begin)


def within(samples: Sequence[Mapping[str, Any]], begin: float, end: float) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if begin <= sample["seconds"] <= end]


def stage_figures(samples: Sequence[Mapping[str, Any]], stage: Stage) -> Figures:
    """What was seen between the first and the last sample of a stage that has settled."""
    users, begin, end = stage
    found = within(samples, settled(stage), end)
    if len(found) < 2:
        raise RuntimeError(f"a stage of {end - begin:.1f} s is too short to be measured: more --seconds")
    first, last = found[0], found[-1]
    seconds = last["seconds"] - first["seconds"]
    per_second = {name: (last[name] - first[name]) / seconds for name in RATES}
    rss = [sample["rss"] for sample in found if sample["rss"] is not None]
    return {
        "users": users,
        "seconds": round(seconds, 1),
        **{f"{name}_per_s": round(rate, 2) for name, rate in per_second.items()},
        "rss_median": statistics.median(rss) if rss else None,
        "rss_max": max(rss, default=None),
        "client_cpu_share": round((last["client_cpu_seconds"] - first["client_cpu_seconds"]) / seconds, 3),
    }


def saturated_at(rates: Sequence[float]) -> int | None:
    """The first stage near the best, if others come after it; None where tokens/s still grow, or there are none."""
    if not any(rates):
        return None
    first = next(i for i, rate in enumerate(rates) if rate >= NEAR * max(rates))
    return first if first < len(rates) - 1 else None


def verdicts(
    stages: Sequence[Stage], by_stage: Sequence[Figures], samples: Sequence[Mapping[str, Any]], failures: int
) -> Figures:
    rates = [figures["tokens_per_s"] + figures["prompt_tokens_per_s"] for figures in by_stage]
    at = saturated_at(rates)
    found: Figures = {"no_failures": not failures, "throughput_flat": None, "memory_flat": None}
    if at is None:
        return found
    begin, end = settled(stages[at]), stages[-1][2]
    last = rates[-1] / statistics.fmean(rates[at:-1])
    halves = [
        [sample["rss"] for sample in within(samples, *half) if sample["rss"] is not None]
        for half in pairwise((begin, (begin + end) / 2, end))
    ]
    found |= {
        "saturated_at_users": stages[at][0],
        "last_to_mean_total_tokens_per_s": round(last, 3),
        "lowest_to_best_total_tokens_per_s": round(min(rates[at:]) / max(rates), 3),
    }
    found["throughput_flat"] = last >= FAR
    if all(halves):
        growth = statistics.median(halves[1]) / statistics.median(halves[0]) - 1
        found |= {"memory_growth": round(growth, 4), "memory_flat": growth <= GROWTH}
    return found


def judged(seen: Mapping[str, Any], stages: Sequence[Stage]) -> Figures:
    """The report of what the users saw."""
    samples = seen["samples"]
    by_stage = [stage_figures(samples, stage) for stage in stages]
    return {
        **{name: seen[name] for name in ("answers", "refused", "left", "failures")},
        "stages": by_stage,
        "verdicts": verdicts(stages, by_stage, samples, sum(seen["failures"].values())),
    }


def locust(url: str, pid: int | None, stages: Sequence[Stage], chosen: argparse.Namespace) -> Figures:
    """Runs it to its end; what its users saw."""
    samples = chosen.out / "load_samples.json"
    samples.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", ROOT / "benchmarks" / "locustfile.py", "--headless", "-H", url]
    command += ["--html", chosen.out / "load.html", "--csv", chosen.out / "load", "--samples", samples]
    command += ["--stop-timeout", "10", "--only-summary", "--api-keys", ",".join(chosen.keys), "--think", chosen.think]
    command += ["--answer-tokens", chosen.answer_tokens, "--server-pid", pid or 0]
    command += ["--tags", *chosen.tags] if chosen.tags else []
    text = ",".join(f"{users}x{end - begin}" for users, begin, end in stages)
    ended = subprocess.run([str(part) for part in command], env={**os.environ, "LOAD_STAGES": text}, cwd=ROOT)
    if not samples.is_file():
        raise RuntimeError(f"locust left nothing behind; its exit code is {ended.returncode}")
    seen: Figures = json.loads(samples.read_text())
    samples.unlink()
    return seen


@contextmanager
def target(chosen: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Where the server is, and its process."""
    if chosen.url is not None:
        yield chosen.url, chosen.pid
        return
    with served(*SERVER, f"auth.api_keys={','.join(KEYS)}", *chosen.set) as server:
        yield server.url, server.pid


def print_report(report: Figures) -> None:
    for stage in report["stages"]:
        memory = "" if stage["rss_median"] is None else f", {stage['rss_median'] / 2**20:,.0f} MiB"
        rates = f"{stage['tokens_per_s']:8,.0f} tokens/s, {stage['answers_per_s']:6.1f} answers/s"
        rates += f", {stage['prompt_tokens_per_s']:8,.0f} tokens of prompts/s"
        refused, busy = f"{stage['refused_per_s']:6.1f} refused/s", f"client busy {stage['client_cpu_share']:.0%}"
        print(f"{stage['users']:>5} users: {rates}, {refused}{memory}; {busy}")
    for name in ("failures", "verdicts"):
        print(f"{name}: {report[name]}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.load"
    )
    parser.add_argument("--seconds", type=float, default=600, help="of all stages together")
    parser.add_argument("--users", type=int, default=256, help="of the last stage")
    parser.add_argument("--tags", nargs="*", default=[], help="scenarios; else all")
    parser.add_argument("--think", type=float, default=1.0, help="seconds between an answer and the next request")
    parser.add_argument("--answer-tokens", type=int, default=64, help="on the average")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of the server that it starts")
    parser.add_argument("--url", help="a server that runs; else one is started")
    parser.add_argument("--pid", type=int, help="its process")
    parser.add_argument("--keys", nargs="*", help="its API keys")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args(argv)
    if chosen.users < 2 or not chosen.seconds > 0:
        parser.error("--users and --seconds: should be at least 2, and above 0")
    if chosen.keys is None:
        chosen.keys = [] if chosen.url else KEYS
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    chosen = parse(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    stages = stages_of(chosen.users, chosen.seconds)
    with target(chosen) as (url, pid):
        seen = locust(url, pid, stages, chosen)
    options = {"server": None if chosen.url else [*SERVER, *chosen.set], "think": chosen.think, "tags": chosen.tags}
    report = {**report_head(["locust", "gevent", "torch", "numba"]), **options, **judged(seen, stages)}
    write_json(chosen.out / FILE, report)
    print_report(report)
    return int(False in report["verdicts"].values())


if __name__ == "__main__":
    sys.exit(main())
