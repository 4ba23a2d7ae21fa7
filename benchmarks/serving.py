"""What clients of a real server see: four scenarios, each against its baseline in the same run, by turns.

    python -m benchmarks.serving                                       # all of them, about ten minutes
    python -m benchmarks.serving --only prompt --targets 100 24 --rounds 5

Servers run in processes of their own with the bundled model; clients speak HTTP over loopback from this one, whose
strain is part of the figures. No figure of a scenario is printed when texts differ that should be the same. Writes
`serving.json`, a key for each scenario, where scenarios that were not asked for stay as they are:

    prompt      streams decode, and a long prompt arrives: the 99th percentile of the gaps between their tokens while it
                is computed, against that of the same streams just before; by scheduler.target_step_ms
    keys        the seconds to the first token of a tenant that sends one request at a time, while another one floods,
                against the same alone; and how evenly two that flood are served (Jain's index, 1 is evenly); by
                scheduler.max_running
    beginning   many chat requests share a system prompt: prompt tokens computed and seconds to the first token, against
                a server that keeps nothing (requests at the same time still share), and one that shares nothing either
    batching    in process: tokens/s of continuous against static batching of completions whose lengths have a heavy
    tail
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop

from bdh_batch.bench.strain import Watch
from bdh_batch.engine.loading import load_engine
from bdh_batch.scheduler.prefixes import common, pack
from bdh_batch.server import bundled_model
from bdh_batch.settings import load
from benchmarks.client import Response, Served, Stream, load_json, served
from benchmarks.common import figure, ratio, report_head, write_json
from benchmarks.plots import bars, lines
from benchmarks.static import Job, continuous, heavy_tailed, ideal, static

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "tests" / "data" / "shakespeare-validation.txt").read_text()
ENDLESS = 100_000  # tokens asked for by streams that decode until their client leaves
GREEDY: dict[str, Any] = {"temperature": 0.0}
KEYS = ("key-of-a-flood", "key-of-one-at-a-time")
Figures = dict[str, Any]
Window = tuple[float, float]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least this share of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]


def jain(amounts: Sequence[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has all."""
    return sum(amounts) ** 2 / (len(amounts) * sum(amount**2 for amount in amounts))


def text(draw: random.Random, length: int) -> str:
    """So many tokens (characters) of real text that begin like no other."""
    at = draw.randrange(len(TEXT))
    return (f"{draw.getrandbits(48):012x} " + TEXT[at:] + TEXT * (length // len(TEXT) + 1))[:length]


def strained(watch: Watch) -> Figures:
    """Whether the clients themselves were the bottleneck."""
    return asdict(watch.strain(()))


def refuse_unless(same: bool, what: str) -> None:
    if not same:
        sys.exit(f"{what}: no figure is worth printing.")


def gaps(responses: Sequence[Response], window: Window) -> list[float]:
    """Between tokens of a stream, all that lie in `window`."""
    begin, end = window
    return [b - a for response in responses for a, b in pairwise(response.times) if begin <= a and b <= end]


# A long prompt beside streams


async def prompt(chosen: argparse.Namespace) -> Figures:
    """A state's memory is taken when it is first written, which makes that step longer: see `used_before`."""
    by_target, first_tokens = [], []
    for target, used in [*((target, True) for target in chosen.targets), *((target, False) for target in chosen.fresh)]:
        options = ["scheduler.max_running=48", "prefix_cache.entries=16"] if used else []
        with served(f"scheduler.target_step_ms={target}", *options, *chosen.set) as server:
            if used:
                await use_all_slots(server, 2 * (48 + 16))
            figures, tokens = await beside_streams(server, chosen)
        first_tokens.append(tokens)
        by_target.append({"target_step_ms": target, "used_before": used, **figures})
        print_scenario(f"target {target:g} ms, slots used before: {used}", figures)
    refuse_unless(len(set(map(tuple, first_tokens))) == 1, "The long prompts' completions differ between targets")
    return {"streams": chosen.streams, "prompt_tokens": chosen.long, "by_target": by_target}


async def use_all_slots(server: Served, requests: int) -> None:
    draw = random.Random(0)
    for _ in range(2):
        await asyncio.gather(*[server.ask(prompt=text(draw, 64), max_tokens=2) for _ in range(requests)])


async def beside_streams(server: Served, chosen: argparse.Namespace) -> tuple[Figures, list[int]]:
    """Each round is a while without and a while with a long prompt; the first finds out how long that is."""
    draw = random.Random(1)
    bodies: list[dict[str, Any]] = [{"prompt": text(draw, 64), "seed": seed} for seed in range(chosen.streams)]
    streams = [await server.send(max_tokens=ENDLESS, **body) for body in bodies]
    await until_decoding(streams)
    windows: list[tuple[Window, Window]] = []
    long, seconds = [], 1.0
    async with Watch() as watch:
        for _ in range(chosen.rounds + 1):
            await asyncio.sleep(1.1 * seconds)
            response = await server.ask(prompt=text(draw, chosen.long), max_tokens=1, **GREEDY)
            refuse_unless(response.cached_tokens == 0, "A long prompt was partly cached")
            seconds = response.first
            long.append(response)
            windows.append(((response.sent - seconds, response.sent), (response.sent, response.times[0])))
            await asyncio.sleep(0.3)
    beside = [await stream.leave() for stream in streams]
    alone = await server.ask(max_tokens=len(beside[0].tokens), **bodies[0])
    refuse_unless(alone.tokens == beside[0].tokens, "A stream's text differs from its text alone")
    figures = gap_figures(beside, windows[1:])
    figures["prompt_seconds_to_first_token"] = statistics.median(response.first for response in long[1:])
    return {**figures, "client": strained(watch)}, [response.tokens[0] for response in long]


async def until_decoding(streams: Sequence[Stream], pieces: int = 20) -> None:
    while any(stream.pieces < pieces for stream in streams):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def gap_figures(responses: Sequence[Response], windows: Sequence[tuple[Window, Window]]) -> Figures:
    without = [gaps(responses, before) for before, _ in windows]
    beside = [gaps(responses, during) for _, during in windows]
    compared = ratio([percentile(g, 0.99) for g in beside], [percentile(g, 0.99) for g in without])
    return {
        "rounds": len(windows),
        "p99_gap_ratio": asdict(compared),
        "figure": figure([1e3 * percentile(g, 0.99) for g in beside], "ms", "lower"),
        **gap_percentiles("without", [gap for found in without for gap in found]),
        **gap_percentiles("beside", [gap for found in beside for gap in found]),
    }


def gap_percentiles(name: str, found: Sequence[float]) -> Figures:
    shares = {"median": 0.5, "p99": 0.99, "max": 1.0}
    return {f"{name}_{label}_gap_ms": 1e3 * percentile(found, share) for label, share in shares.items()}


# Two tenants


async def keys(chosen: argparse.Namespace) -> Figures:
    by_running = []
    for running in chosen.running:
        options = [f"scheduler.max_running={running}", "auth.enabled=true", f"auth.api_keys={','.join(KEYS)}"]
        with served(*options, *chosen.set) as server:
            async with Watch() as watch:
                figures = {**await beside_a_flood(server, chosen), **await two_floods(server, chosen)}
        by_running.append({"max_running": running, **figures, "client": strained(watch)})
        print_scenario(f"max_running {running}", by_running[-1])
    queue = load().settings.scheduler.max_queued_requests
    return {"flood": chosen.flood, "max_queued_requests": queue, "options": chosen.set, "by_max_running": by_running}


async def beside_a_flood(server: Served, chosen: argparse.Namespace) -> Figures:
    """One at a time alone, then beside a flood, with other prompts, as the first ones' prefixes are cached."""
    draw = random.Random(2)
    alone: list[list[Response]] = []
    beside: list[list[Response]] = []
    for _ in range(chosen.rounds_of_keys + 1):
        alone.append([await server.ask(key=KEYS[1], **single(draw, chosen)) for _ in range(chosen.singles)])
        flood = asyncio.gather(*[server.ask(key=KEYS[0], **body) for body in flooding(draw, chosen)])
        await asyncio.sleep(0.5)
        bodies = [single(draw, chosen) for _ in range(chosen.singles)]
        found = [await server.ask(key=KEYS[1], **body) for body in bodies if not flood.done()]
        over = sorted(response.times[-1] for response in await flood)[-chosen.still]
        beside.append(
            [response for response in found if response.times[0] < over]
        )  # later ones met what was left of it
        again = [await server.ask(key=KEYS[1], **body) for body, _ in zip(bodies, found)]
        same = all(a.tokens == b.tokens for a, b in zip(again, found, strict=True))
        refuse_unless(same, "A text beside a flood differs from the same alone")
        refuse_unless(not any(a.cached_tokens for a in [*alone[-1], *found]), "A prompt was partly cached")
    ones, others = ([response.first for row in run[1:] for response in row] for run in (alone, beside))
    return {
        "alone_seconds": statistics.median(ones),
        "beside_seconds": statistics.median(others),
        "ratio": statistics.median(others) / statistics.median(ones),
        "beside_p90_seconds": percentile(others, 0.9),
        "requests_beside": [len(row) for row in beside[1:]],
        "figure_alone": figure(median_ms(alone[1:]), "ms", "lower"),
        "figure": figure(median_ms(beside[1:]), "ms", "lower"),
    }


def median_ms(rounds: Sequence[Sequence[Response]]) -> list[float]:
    """To the first token, round by round."""
    return [1e3 * statistics.median(response.first for response in row) for row in rounds if row]


def single(draw: random.Random, chosen: argparse.Namespace) -> dict[str, Any]:
    return {"prompt": text(draw, chosen.single_tokens), "max_tokens": 8, **GREEDY}


def flooding(draw: random.Random, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    return [
        {"prompt": text(draw, draw.randrange(32, 96)), "max_tokens": draw.randrange(16, 64), "seed": 1}
        for _ in range(chosen.flood)
    ]


async def two_floods(server: Served, chosen: argparse.Namespace) -> Figures:
    """The first tenant's requests come first, and ask for longer completions; what counts is tokens while both have
    some."""
    draw = random.Random(3)
    floods = []
    for key, scale in zip(KEYS, (2, 1)):
        bodies = [{**body, "max_tokens": scale * body["max_tokens"]} for body in flooding(draw, chosen)]
        floods.append(asyncio.gather(*[server.ask(key=key, **body) for body in bodies]))
        await asyncio.sleep(0.3)
    responses = [await flood for flood in floods]
    begin = max(response.sent for flood in responses for response in flood)
    waiting = min(max(response.times[0] for response in flood) for flood in responses)
    unfinished = min(percentile([response.times[-1] for response in flood], 0.8) for flood in responses)
    by_window = {"waiting": (begin, waiting), "unfinished": (begin, unfinished)}
    return {f"both_{name}": shares(responses, window) for name, window in by_window.items()}


def shares(responses: Sequence[Sequence[Response]], window: Window) -> Figures:
    """What each flood was served in `window`: generated tokens, and the prompts whose first token came in it."""
    begin, end = window
    generated = [sum(begin < at <= end for response in flood for at in response.times) for flood in responses]
    prompts = [sum(len(a.prompt) for a in flood if begin < a.times[0] <= end) for flood in responses]
    tokens = [a + b for a, b in zip(generated, prompts, strict=True)]
    return {"seconds": end - begin, "jain": jain(tokens), "generated": generated, "prompts": prompts}


# A shared prefix


async def shared_prefix(chosen: argparse.Namespace) -> Figures:
    draw = random.Random(4)
    few = ["scheduler.max_running=32", "prefix_cache.entries=32", *chosen.set]
    off = ["prefix_cache.enabled=false"]
    kinds = {"kept": [], "not_kept": off, "not_shared": [*off, f"prefix_cache.min_tokens={2**30}"]}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(served(*few, *options)) for name, options in kinds.items()}
        for server in servers.values():
            await use_all_slots(server, 2 * (32 + 32))
        async with Watch() as watch:
            figures = {
                "one_after_another": await asked(servers, chats(draw, chosen), 1),
                f"{chosen.together}_at_a_time": await asked(servers, chats(draw, chosen), chosen.together),
            }
    for name, found in figures.items():
        print_scenario(name, found)
    return {"requests": chosen.chats, "system_tokens": chosen.system, **figures, "client": strained(watch)}


def chats(draw: random.Random, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Bodies of chat requests with a system prompt in common and a question each."""
    system = {"role": "system", "content": text(draw, chosen.system)}
    questions = [{"role": "user", "content": text(draw, draw.randrange(20, 60))} for _ in range(chosen.chats)]
    return [{"messages": [system, question], "max_tokens": 8, **GREEDY} for question in questions]


async def asked(servers: Mapping[str, Served], bodies: Sequence[dict[str, Any]], together: int) -> Figures:
    """All of `bodies` of every server, so many together; the servers take turns."""
    computed = {name: -server.metric("bdh_prompt_tokens_total") for name, server in servers.items()}
    responses: dict[str, list[Response]] = {name: [] for name in servers}
    for start in range(0, len(bodies), together):
        for name, server in servers.items():
            some = bodies[start : start + together]
            responses[name] += await asyncio.gather(*[server.ask("/v1/chat/completions", **body) for body in some])
    for found in zip(*responses.values(), strict=True):
        refuse_unless(
            all(one.tokens == found[0].tokens for one in found), "A cached completion differs from an uncached"
        )
    for name, server in servers.items():
        computed[name] += server.metric("bdh_prompt_tokens_total")
    return prefix_figures(responses, computed)


def prefix_figures(responses: Mapping[str, Sequence[Response]], computed: Mapping[str, float]) -> Figures:
    """`shared_tokens` is what all prompts begin with; `least_tokens` what has to be computed if that is once.

    A little less than the least are computed where some of the prompts have more than that in common.
    """
    prompts = [response.prompt for response in responses["kept"]]
    asked_for = sum(map(len, prompts))
    shared = min(common(pack(prompts[0]), pack(other)) for other in prompts[1:])
    least = asked_for - shared * (len(prompts) - 1)
    first = {name: [response.first for response in found] for name, found in responses.items()}
    return {
        "prompt_tokens": asked_for,
        "shared_tokens": shared,
        "least_tokens": least,
        "computed_tokens": dict(computed),
        "computed_to_least": computed["kept"] / least,
        "first_token_seconds": {name: statistics.median(seconds) for name, seconds in first.items()},
        **{f"ratio_to_{name}": asdict(ratio(first["kept"], first[name])) for name in responses if name != "kept"},
    }


# Continuous against static batching


async def batching(chosen: argparse.Namespace) -> Figures:
    draw = random.Random(5)
    options = [("scheduler.max_running", chosen.batch), ("prefix_cache.enabled", "false")]
    settings = load(None, options).settings
    runner = load_engine(settings, bundled_model()).runner
    cap = settings.scheduler.prefill_tokens
    lengths = heavy_tailed(chosen.jobs, chosen.median, chosen.spread, 6)
    jobs = [Job(list(text(draw, 64).encode()), length, seed) for seed, length in enumerate(lengths)]
    seconds: dict[str, list[float]] = {"continuous": [], "padded": [], "ragged": []}
    for number in range(chosen.rounds_of_batching):
        responses = {}
        for name, measured in seconds.items():
            began = time.perf_counter()
            if name == "continuous":
                responses[name] = await continuous(runner, jobs, chosen.batch, cap)
            else:
                responses[name] = static(runner, jobs, chosen.batch, cap, padded=name == "padded")
            measured.append(time.perf_counter() - began)
        refuse_unless(responses["continuous"] == responses["padded"] == responses["ragged"], "Texts differ")
        print(f"batching, round {number}: { {name: round(all_[-1], 2) for name, all_ in seconds.items()} }", flush=True)
    total = sum(lengths)
    figures = {
        "requests": len(jobs),
        "batch": chosen.batch,
        "answer_tokens": {"total": total, "median": statistics.median(lengths), "max": max(lengths)},
        "ideal_ratio_to_padded": ideal(lengths, chosen.batch),
        "tokens_per_s": {name: total / statistics.median(all_) for name, all_ in seconds.items()},
        "ratio_to_padded": asdict(ratio(seconds["padded"], seconds["continuous"])),
        "ratio_to_ragged": asdict(ratio(seconds["ragged"], seconds["continuous"])),
    }
    print_scenario("batching", figures)
    return figures


SCENARIOS = {"prompt": prompt, "keys": keys, "beginning": shared_prefix, "batching": batching}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.serving"
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--targets", nargs="+", type=float, default=[100, 36, 24], help="scheduler.target_step_ms")
    parser.add_argument(
        "--fresh", nargs="*", type=float, default=[36], help="the same, of servers that did nothing yet"
    )
    parser.add_argument("--streams", type=int, default=32, help="that decode beside the long prompt")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=4, help="without and with the long prompt")
    parser.add_argument("--running", nargs="+", type=int, default=[64, 1024], help="scheduler.max_running")
    parser.add_argument("--flood", type=int, default=500, help="requests of a tenant that floods")
    parser.add_argument("--singles", type=int, default=20, help="requests, one at a time, of the other")
    parser.add_argument("--single-tokens", type=int, default=256, help="of their prompts")
    parser.add_argument("--still", type=int, default=50, help="open requests that still are a flood")
    parser.add_argument("--rounds-of-keys", type=int, default=2, help="alone, and beside a flood")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of servers, beside the scenario's own"
    )
    parser.add_argument("--chats", type=int, default=100, help="with a system prompt in common")
    parser.add_argument("--system", type=int, default=2048, help="tokens of the system prompt")
    parser.add_argument("--together", type=int, default=16, help="chats sent at once")
    parser.add_argument("--jobs", type=int, default=256, help="completions with a heavy tail")
    parser.add_argument("--median", type=float, default=48.0, help="tokens of such a completion")
    parser.add_argument("--spread", type=float, default=1.0, help="of the logarithm of its length")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds-of-batching", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(argv)


def print_scenario(name: str, figures: Figures) -> None:
    def short(value: object) -> object:
        if isinstance(value, dict):
            return {key: short(part) for key, part in value.items()}
        return round(value, 4) if isinstance(value, float) else value

    print(f"{name}: {short(figures)}", flush=True)


def draw_gaps(folder: Path, scenario: Figures) -> None:
    used = (row for row in scenario["by_target"] if row["used_before"])
    rows = sorted(used, key=lambda row: float(row["target_step_ms"]))
    targets = [row["target_step_ms"] for row in rows]
    data = {name: (targets, [row[f"{name}_p99_gap_ms"] for row in rows]) for name in ("without", "beside")}
    title = f"{scenario['streams']} streams, and a prompt of {scenario['prompt_tokens']:,} tokens"
    lines(folder / "serving-gaps.svg", title, "scheduler.target_step_ms", "p99 gap between tokens, ms", data)


def draw_fairness(folder: Path, scenario: Figures) -> None:
    series = {
        f"{name}, max_running {row['max_running']}": row[key]
        for row in scenario["by_max_running"]
        for name, key in (("alone", "figure_alone"), ("beside the flood", "figure"))
    }
    title = f"One request at a time, and another tenant with {scenario['flood']} at once"
    values = {name: each["value"] for name, each in series.items()}
    notes = {name: f"{each['low']:.0f} to {each['high']:.0f}" for name, each in series.items()}
    bars(folder / "serving-fairness.svg", title, "ms to the first token, median", values, notes)


def draw(folder: Path, report: Figures) -> None:
    for name, drawing in {"prompt": draw_gaps, "keys": draw_fairness}.items():
        if name in report:
            drawing(folder, report[name])


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    file = chosen.out / "serving.json"
    for name in chosen.only:
        figures = uvloop.run(SCENARIOS[name](chosen))
        head = report_head(["torch", "numba", "uvicorn", "uvloop"])
        write_json(file, {**load_json(file), name: {**head, **figures}})
    draw(chosen.out, load_json(file))


if __name__ == "__main__":
    main()
