"""Load from locust on a server of its own, up to its saturation and beyond, and what becomes of it there.

    python -m benchmarks.stress.load                                         # 10 minutes; make load SECONDS=60 USERS=96
    python -m benchmarks.stress.load --url http://127.0.0.1:8000 --pid 4711  # one that runs; without --pid no memory

The users of `locustfile.py` come in stages: few, enough to saturate it, as many as it has room for, and more: it runs
so many sequences at once, lets as many again wait, and refuses the rest. These levels are climbed, descended and
climbed again, so that what the machine does meanwhile meets all of them, and a server that does not recover is seen.
Leaves locust's report (`load.html`), its CSV (`load_*.csv`) and `load.json`: tokens/s and memory by stage, tokens/s by
level with a round of each climb, failures by kind, and the verdicts

    no_failures      nothing failed; a refusal (429) is no failure
    throughput_flat  at no level past the first that comes near the best are tokens/s far below that one's, by the
                     medians over climbs, and no stage of these levels brings little beside the best; null: never
                     saturated. The tokens of prompts count too: how many completions a stage has left for is much a
                     matter of chance, as some prompts are long
    memory_flat      medians of the memory in both halves of the time since then; null: never saturated, or memory not
                     seen

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
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import served

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
SHARES = (1 / 64, 1 / 8, 1 / 2, 1.0)  # of the users, by level
SETTLING = 0.2  # of a stage, which is not measured: users come, and the queue fills or empties
NEAR, FAR = 0.95, 0.9  # of the best level's tokens/s, which is saturated; of a saturated level's, which is fallen
FALLEN = 0.6  # of the best stage's tokens/s, below which a single stage is no noise
GROWTH = 0.02  # of the memory, that is no leak yet
RATES = ("tokens", "prompt_tokens", "answers", "refused")
KEYS = ("load-1", "load-2", "load-3")
SERVER = (
    "scheduler.max_running=64",
    "scheduler.max_queued_requests=64",
    "engine.state_memory=3 GiB",
    "auth.enabled=true",
)
FILE, SAMPLES = "load.json", "load_samples.json"
Figures = dict[str, Any]
Stage = tuple[int, float, float]  # users, from and to second


def stages_of(users: int, seconds: float, climbs: int) -> list[Stage]:
    """As long as each other: all levels upwards, then downwards, and so on."""
    levels = sorted({max(1, round(share * users)) for share in SHARES})
    numbers = [users for climb in range(climbs) for users in (levels[::-1] if climb % 2 else levels)]
    each = seconds / len(numbers)
    return [(number, i * each, (i + 1) * each) for i, number in enumerate(numbers)]


def settled(stage: Stage) -> float:
    """The second from which it is measured."""
    _, begin, end = stage
    return begin + SETTLING * (end - begin)


def within(samples: Sequence[Mapping[str, Any]], begin: float, end: float) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if begin <= sample["seconds"] <= end]


def stage_figures(samples: Sequence[Mapping[str, Any]], stage: Stage) -> Figures:
    """What was seen between the first and the last sample of a stage that has settled and has its users."""
    users, begin, end = stage
    found = [sample for sample in within(samples, settled(stage), end) if sample["users"] == users]
    if len(found) < 2:
        raise RuntimeError(f"a stage of {end - begin:.1f} s was too short to be measured: more --seconds")
    first, last = found[0], found[-1]
    seconds = last["seconds"] - first["seconds"]
    per_second = {name: (last[name] - first[name]) / seconds for name in RATES}
    rss = [sample["rss"] for sample in found if sample["rss"] is not None]
    return {
        "users": users,
        "from_second": round(first["seconds"], 1),
        "seconds": round(seconds, 1),
        **{f"{name}_per_s": round(rate, 2) for name, rate in per_second.items()},
        "rss_median": statistics.median(rss) if rss else None,
        "rss_max": max(rss, default=None),
        "client_cpu_share": round((last["client_cpu_seconds"] - first["client_cpu_seconds"]) / seconds, 3),
    }


def levels_of(by_stage: Sequence[Figures]) -> list[Figures]:
    """Each number of users with the tokens/s of its stages, those of prompts too, and of those generated."""
    found = []
    for users in sorted({stage["users"] for stage in by_stage}):
        stages = [stage for stage in by_stage if stage["users"] == users]
        found.append(
            {
                "users": users,
                "total_tokens_per_s": figure([total(stage) for stage in stages], "tokens/s", "higher"),
                "tokens_per_s": figure([stage["tokens_per_s"] for stage in stages], "tokens/s", "higher"),
            }
        )
    return found


def saturated_at(rates: Sequence[float]) -> int | None:
    """The first level that once came near the best, if others come after it; None where tokens/s still grow, or there
    are none."""
    if not any(rates):
        return None
    first = next(i for i, rate in enumerate(rates) if rate >= NEAR * max(rates))
    return first if first < len(rates) - 1 else None


def verdicts(by_stage: Sequence[Figures], levels: Sequence[Figures], seen: Mapping[str, Any]) -> Figures:
    found: Figures = {"no_failures": not seen["failures"], "throughput_flat": None, "memory_flat": None}
    at = saturated_at([max(level["total_tokens_per_s"]["rounds"]) for level in levels])
    if at is None:
        return found
    users, rates = levels[at]["users"], [total(stage) for stage in by_stage]
    fallen = [i for i, stage in enumerate(by_stage) if stage["users"] >= users and rates[i] < FALLEN * max(rates)]
    found |= {"saturated_at_users": users, "fallen_stages": fallen}
    if all(rates):  # else there is no ratio to what was nothing
        ratios = to_first(levels[at:])
        found["total_tokens_per_s_to_saturated"] = ratios
        found["throughput_flat"] = not fallen and all(each["value"] >= FAR for each in ratios.values())
    else:
        found["throughput_flat"] = False
    return found | of_memory(seen["samples"], by_stage, users)


def to_first(levels: Sequence[Figures]) -> Figures:
    """How many times the first level's tokens/s each other's are."""
    first, *others = levels
    below = first["total_tokens_per_s"]["rounds"]
    return {str(level["users"]): asdict(ratio(level["total_tokens_per_s"]["rounds"], below)) for level in others}


def total(stage: Figures) -> float:
    """Tokens/s, those of prompts too."""
    return float(stage["tokens_per_s"] + stage["prompt_tokens_per_s"])


def of_memory(samples: Sequence[Mapping[str, Any]], by_stage: Sequence[Figures], users: int) -> Figures:
    """Whether it grew since there first were so many."""
    begin = next(stage["from_second"] for stage in by_stage if stage["users"] >= users)
    end = samples[-1]["seconds"]
    halves = [
        [sample["rss"] for sample in within(samples, *half) if sample["rss"] is not None]
        for half in pairwise((begin, (begin + end) / 2, end))
    ]
    if not all(halves):
        return {}
    growth = statistics.median(halves[1]) / statistics.median(halves[0]) - 1
    return {"memory_growth": round(growth, 4), "memory_flat": growth <= GROWTH}


def judged(seen: Mapping[str, Any], stages: Sequence[Stage]) -> Figures:
    """The report of what the users saw."""
    if (last := seen["samples"][-1]["seconds"]) < settled(stages[-1]):
        raise RuntimeError(f"locust ended after {last:.0f} s, before its last stage")
    by_stage = [stage_figures(seen["samples"], stage) for stage in stages]
    levels = levels_of(by_stage)
    return {
        **{name: seen[name] for name in ("answers", "refused", "left", "stopped", "failures")},
        "stages": by_stage,
        "levels": levels,
        "verdicts": verdicts(by_stage, levels, seen),
    }


def locust(url: str, pid: int | None, stages: Sequence[Stage], chosen: argparse.Namespace) -> Figures:
    """Runs it to its end; what its users saw."""
    samples = chosen.out / SAMPLES
    samples.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", LOCUSTFILE, "--headless", "-H", url]
    command += ["--html", chosen.out / "load.html", "--csv", chosen.out / "load", "--samples", samples]
    command += ["--only-summary", "--api-keys", ",".join(chosen.keys), "--think", chosen.think]
    command += ["--answer-tokens", chosen.answer_tokens, "--server-pid", pid or 0]
    command += ["--tags", *chosen.tags] if chosen.tags else []
    text = ",".join(f"{users}x{end - begin}" for users, begin, end in stages)
    ended = subprocess.run([str(part) for part in command], env={**os.environ, "LOAD_STAGES": text}, cwd=ROOT)
    if not samples.is_file():
        raise RuntimeError(f"locust left nothing behind; its exit code is {ended.returncode}")
    seen: Figures = json.loads(samples.read_text())
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
        rates = f"{stage['tokens_per_s']:8,.0f} tokens/s, {stage['answers_per_s']:6.1f} completions/s"
        rates += f", {stage['prompt_tokens_per_s']:8,.0f} tokens of prompts/s"
        refused, busy = f"{stage['refused_per_s']:6.1f} refused/s", f"client busy {stage['client_cpu_share']:.0%}"
        print(f"{stage['users']:>5} users: {rates}, {refused}{memory}; {busy}")
    for level in report["levels"]:
        total, generated = level["total_tokens_per_s"], level["tokens_per_s"]
        print(f"{level['users']:>5} users: {total['value']:,.0f} tokens/s, {generated['value']:,.0f} of answers")
    if report["verdicts"]["throughput_flat"] is None:
        print("It was never saturated: more --users show what becomes of it then.")
    for name in ("failures", "verdicts"):
        print(f"{name}: {report[name]}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.stress.load",
    )
    parser.add_argument("--seconds", type=float, default=600, help="of all stages together")
    parser.add_argument("--users", type=int, default=256, help="of the highest level")
    parser.add_argument("--climbs", type=int, default=4, help="of the levels, up and down in turn")
    parser.add_argument("--tags", nargs="*", default=[], help="scenarios; else all")
    parser.add_argument("--think", type=float, default=1.0, help="seconds between a completion and the next request")
    parser.add_argument("--answer-tokens", type=int, default=64, help="on the average")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of the server that it starts")
    parser.add_argument("--url", help="a server that runs; else one is started")
    parser.add_argument("--pid", type=int, help="its process")
    parser.add_argument("--keys", nargs="*", help="its API keys")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    if chosen.users < 2 or chosen.climbs < 1 or not chosen.seconds > 0:
        parser.error("--users, --climbs and --seconds: should be at least 2, at least 1, and above 0")
    if chosen.keys is None:
        chosen.keys = [] if chosen.url else KEYS
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    chosen = parse(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    head = report_head(["locust", "gevent", "torch", "numba"])
    stages = stages_of(chosen.users, chosen.seconds, chosen.climbs)
    with target(chosen) as (url, pid):
        seen = locust(url, pid, stages, chosen)
    options = {"server": None if chosen.url else [*SERVER, *chosen.set], "think": chosen.think, "tags": chosen.tags}
    report = {**head, **options, **judged(seen, stages)}
    write_report(chosen.out / FILE, report)
    (chosen.out / SAMPLES).unlink()
    print_report(report)
    return int(False in report["verdicts"].values())


if __name__ == "__main__":
    sys.exit(main())
