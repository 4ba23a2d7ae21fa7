"""The server over HTTP against its own engine in process and against the baselines: the same loads, by turns.

    python -m benchmarks.server.throughput          # all of it, about a quarter of an hour
    python -m benchmarks.server.throughput --quick  # whether it works: figures of nothing

All servers that are needed run from the beginning to the end, each in its process; `bench serve` measures them from a
process of its own, whose strain is reported (`client`). No figure is written where a request failed or a completion
lacks a token. Writes `server.json`, a key for each measurement, and a plot:

    against       tokens/s at so many streams of even completions, which begin as others end; of the engine in process,
    in
                  this process, through the same scheduler and worker; and of the baselines. One at a time, more streams
                  change nothing but the wait: those get the first `requests` of the load
    heavy_tailed  the server against static batching, where the lengths of completions have a heavy tail
    curve         tokens/s against the time of a completion, by how many streams there are
    first_token   milliseconds to the first token, 99th percentile: of one request at a time, and of a Poisson process
                  at a share of the rate at which the server is saturated

A `goal` is what a ratio should be; `met` says whether it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bdh_batch import settings
from bdh_batch.engine.loading import load_engine
from bdh_batch.processes.model_settings import bundled_model
from benchmarks import ROOT
from benchmarks.common import figure, ratio
from benchmarks.engine.static import heavy_tailed, ideal
from benchmarks.plots import curves
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import served
from benchmarks.server import loads
from benchmarks.server.systems import TEMPERATURE, Figures, InProcess, Remote, System

ONE_BY_ONE = 2  # requests that warm those which have a single slot
KEPT = 32  # states of each prefix cache: no prompt comes twice, and there are several servers
SERVER, ENGINE = "server", "engine"


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    report: Figures = {
        **report_head(["torch", "numba", "uvicorn", "uvloop"]),
        "model": os.path.relpath(chosen.model, ROOT),
        "options": options_of(chosen),
        "prompt_tokens": loads.PROMPT,
        "temperature": TEMPERATURE,
    }
    with ExitStack() as stack:
        servers = {
            name: Remote(stack.enter_context(served(f"model.path={chosen.model}", *options, module=module)).port)
            for name, (module, options) in modules(chosen).items()
            if any(name in NEEDED[measurement] for measurement in chosen.only)
        }
        bench = Bench(chosen, servers)
        for name, system in bench.systems.items():
            bench.warm(name, system)
        for name in chosen.only:
            report[name] = MEASUREMENTS[name](bench)
            print(f"{name}: {short(report[name])}", flush=True)
    write_report(chosen.out / "server.json", report)
    draw(chosen.out, report)


def options_of(chosen: argparse.Namespace) -> list[str]:
    """Of all servers, and of the engine in process; except the model."""
    streams = max(chosen.streams, *chosen.concurrency)
    return [f"scheduler.max_running={streams}", f"prefix_cache.entries={KEPT}"]


def modules(chosen: argparse.Namespace) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """What runs each server, as `python -m`, and its options."""
    every = options_of(chosen)
    own = [*every, "prefix_cache.enabled=false"]  # these cache nothing, and have a slot for each row
    batch = ("--batch", str(chosen.batch))
    return {
        SERVER: (("bdh_batch", "serve"), every),
        "one_at_a_time": (("benchmarks.server.baselines", "one-at-a-time"), [*own, "scheduler.max_running=1"]),
        "upstream": (("benchmarks.server.baselines", "upstream"), [*own, "scheduler.max_running=1"]),
        "static": (("benchmarks.server.baselines", "static", *batch), [*own, f"scheduler.max_running={chosen.batch}"]),
        "dense": (("benchmarks.server.baselines", "dense"), every),
    }


class Bench:
    def __init__(self, chosen: argparse.Namespace, servers: Mapping[str, Remote]) -> None:
        self.chosen = chosen
        self.systems: Mapping[str, System] = servers
        self.server = servers[SERVER]

    def turns(self, rounds: int, systems: Mapping[str, Callable[[int], Figures]]) -> dict[str, list[Figures]]:
        """What each system brings in each round, of which it is given the number."""
        found: dict[str, list[Figures]] = {name: [] for name in systems}
        for number in range(rounds):
            for name, system in systems.items():
                found[name].append(system(number))
                rate = found[name][-1]["output_throughput"]
                print(f"round {number}, {name}: {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        return found

    def warm(self, name: str, system: System) -> None:
        """A state's memory is taken when it is first written: here, by more requests than there are slots."""
        streams = max(self.chosen.streams, *self.chosen.concurrency)
        many = ONE_BY_ONE if name in ("one_at_a_time", "upstream") else 2 * (streams + KEPT)
        system(loads.load([2] * many, seed=-1), streams)


# Measurements


def against(bench: Bench) -> Figures:
    chosen = bench.chosen
    overrides = [(option, value) for option, _, value in (text.partition("=") for text in options_of(chosen))]
    overrides.append(("model.path", str(chosen.model)))
    resolved = settings.load(None, overrides).settings
    engine = InProcess(load_engine(resolved, chosen.model), resolved)
    bench.warm(ENGINE, engine)
    systems: dict[str, System] = {SERVER: bench.server, ENGINE: engine, **bench.systems}
    counts = {
        SERVER: chosen.requests,
        ENGINE: chosen.requests,
        "one_at_a_time": max(1, chosen.requests // 4),
        "upstream": max(1, chosen.requests // 64),
        "static": chosen.requests,
        "dense": max(1, chosen.requests // 2),
    }

    def turn(name: str, number: int) -> Figures:
        load = loads.load([chosen.length] * chosen.requests, seed=number)
        return systems[name](load[: counts[name]], chosen.streams)

    found = bench.turns(chosen.rounds, {name: partial(turn, name) for name in systems})
    rates = {name: [each["output_throughput"] for each in rounds] for name, rounds in found.items()}
    return {
        "streams": chosen.streams,
        "answer_tokens": chosen.length,
        "sides": {
            name: {"requests": counts[name], "tokens_per_s": figure(each, "tokens/s", "higher"), **client(found[name])}
            for name, each in rates.items()
        },
        "ratios": {
            "to_engine": judged(rates[SERVER], rates[ENGINE], least=0.85),
            "to_one_at_a_time": judged(rates[SERVER], rates["one_at_a_time"]),
            "to_upstream": judged(rates[SERVER], rates["upstream"], least=10.0),
            "to_static": judged(rates[SERVER], rates["static"]),
            "to_dense": judged(rates[SERVER], rates["dense"]),
        },
    }


def heavy(bench: Bench) -> Figures:
    chosen = bench.chosen
    lengths = heavy_tailed(chosen.tail_requests, chosen.tail_median, 1.0, seed=6)

    def turn(name: str, number: int) -> Figures:
        return bench.systems[name](loads.load(lengths, seed=100 + number), chosen.streams)

    names = (SERVER, "static")
    found = bench.turns(chosen.tail_rounds, {name: partial(turn, name) for name in names})
    rates = {name: [each["output_throughput"] for each in rounds] for name, rounds in found.items()}
    return {
        "streams": chosen.streams,
        "requests": len(lengths),
        "answer_tokens": {"total": sum(lengths), "median": sorted(lengths)[len(lengths) // 2], "max": max(lengths)},
        "batch_of_static": chosen.batch,
        "rows_computed_to_needed": {str(batch): ideal(lengths, batch) for batch in (8, 16, 32, 64)},
        "sides": {
            name: {"tokens_per_s": figure(rounds, "tokens/s", "higher"), **client(found[name])}
            for name, rounds in rates.items()
        },
        "ratios": {"to_static": judged(rates[SERVER], rates["static"], least=2.0)},
    }


def curve(bench: Bench) -> Figures:
    chosen = bench.chosen
    points = [(name, streams) for streams in chosen.concurrency for name in (SERVER, "static")]
    points += [("one_at_a_time", streams) for streams in chosen.concurrency if streams <= chosen.most_for_one]

    def turn(name: str, streams: int, number: int) -> Figures:
        lengths = [min(4 * chosen.length, length) for length in heavy_tailed(max(12, 3 * streams), 32.0, 0.7, streams)]
        return bench.systems[name](loads.load(lengths, seed=10_000 + 1000 * number + streams), streams)

    found = bench.turns(
        chosen.curve_rounds,
        {f"{name}, {streams} streams": partial(turn, name, streams) for name, streams in points},
    )
    systems: dict[str, list[Figures]] = {}
    for (name, streams), rounds in zip(points, found.values()):
        systems.setdefault(name, []).append({"streams": streams, **point(rounds)})
    return {"sides": systems}


def point(rounds: Sequence[Figures]) -> Figures:
    def of(key: str, unit: str, better: str) -> Figures:
        return figure([each[key] for each in rounds], unit, better)

    return {
        "tokens_per_s": of("output_throughput", "tokens/s", "higher"),
        "mean_answer_ms": of("mean_e2el_ms", "ms", "lower"),
        "p99_first_token_ms": of("p99_ttft_ms", "ms", "lower"),
        "median_token_ms": of("median_tpot_ms", "ms", "lower"),
    }


def first_token(bench: Bench) -> Figures:
    """Each round finds out the rate of saturation, then goes by it."""
    chosen = bench.chosen
    lengths = heavy_tailed(chosen.arrivals, 32.0, 0.7, seed=8)
    saturating = (2 * lengths)[: 8 * chosen.streams]  # of which coming and going are a small part
    rates: list[float] = []

    def saturated(number: int) -> Figures:
        found = bench.server(loads.load(saturating, seed=2000 + number), chosen.streams)
        rates.append(found["output_throughput"] * len(lengths) / sum(lengths))
        return found

    def unloaded(number: int) -> Figures:
        return bench.server(loads.load([8] * chosen.alone, seed=3000 + number), 1)

    def loaded(number: int) -> Figures:
        rate = chosen.share * rates[-1]
        load = loads.load(lengths, seed=4000 + number)
        return bench.server.run(load, "--request-rate", f"{rate:.3f}", "--seed", str(number))

    found = bench.turns(chosen.first_token_rounds, {"saturated": saturated, "unloaded": unloaded, "loaded": loaded})
    p99 = {name: [each["p99_ttft_ms"] for each in found[name]] for name in ("unloaded", "loaded")}
    return {
        "requests": {"unloaded": chosen.alone, "loaded": chosen.arrivals},
        "share_of_saturation": chosen.share,
        "saturation_requests_per_s": figure(rates, "requests/s", "higher"),
        **{
            name: {"p99_first_token_ms": figure(each, "ms", "lower"), **client(found[name])}
            for name, each in p99.items()
        },
        "ratios": {"loaded_to_unloaded": judged(p99["loaded"], p99["unloaded"], most=6.0)},
    }


MEASUREMENTS: dict[str, Callable[[Bench], Figures]] = {
    "against": against,
    "heavy_tailed": heavy,
    "curve": curve,
    "first_token": first_token,
}


NEEDED: dict[str, Sequence[str]] = {  # the servers of each
    "against": (SERVER, "one_at_a_time", "upstream", "static", "dense"),
    "heavy_tailed": (SERVER, "static"),
    "curve": (SERVER, "static", "one_at_a_time"),
    "first_token": (SERVER,),
}


def judged(
    upper: Sequence[float], lower: Sequence[float], least: float | None = None, most: float | None = None
) -> Figures:
    """A ratio, and whether it is what it should be, where that is said."""
    found: Figures = asdict(ratio(upper, lower))
    if least is not None:
        found |= {"goal": f"at least {least:g}", "met": found["value"] >= least}
    if most is not None:
        found |= {"goal": f"at most {most:g}", "met": found["value"] <= most}
    return found


def client(rounds: Sequence[Figures]) -> Figures:
    """How strained `bench serve` was; nothing where it was not what measured."""
    found = [each["client"] for each in rounds if "client" in each]
    if not found:
        return {}
    signs = sorted({sign for each in found for sign in each["bottleneck"]})
    return {"client": {"largest_cpu_share": max(each["cpu_share"] for each in found), "signs_of_strain": signs}}


def draw(folder: Path, report: Figures) -> None:
    if "curve" not in report:
        return
    data, notes = {}, {}
    for name, points in report["curve"]["sides"].items():
        data[name] = (
            [each["mean_answer_ms"]["value"] for each in points],
            [each["tokens_per_s"]["value"] for each in points],
        )
        notes[name] = [str(each["streams"]) for each in points]
    title = "Throughput against latency; at each point, how many streams"
    curves(folder / "server-curve.svg", title, "ms from request to last token, mean", "tokens/s", data, notes)


def short(value: object) -> object:
    """To be read: without rounds, and with few digits."""
    if isinstance(value, dict):
        return {key: short(part) for key, part in value.items() if key != "rounds"}
    if isinstance(value, list):
        return [short(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


QUICK = {
    "streams": 8,
    "requests": 16,
    "length": 24,
    "rounds": 2,
    "tail_requests": 16,
    "tail_median": 8.0,
    "tail_rounds": 2,
    "concurrency": [1, 4],
    "most_for_one": 1,
    "curve_rounds": 2,
    "arrivals": 32,
    "alone": 12,
    "first_token_rounds": 2,
    "batch": 8,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.server.throughput",
    )
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--model", type=Path, default=bundled_model(), help="one that reads bytes")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128, help="against: of the whole load")
    parser.add_argument("--length", type=int, default=128, help="against: tokens of each completion")
    parser.add_argument("--rounds", type=int, default=4, help="against")
    parser.add_argument("--batch", type=int, default=32, help="of static batching")
    parser.add_argument("--tail-requests", type=int, default=256, help="heavy_tailed")
    parser.add_argument("--tail-median", type=float, default=48.0, help="heavy_tailed: tokens of a completion")
    parser.add_argument("--tail-rounds", type=int, default=3, help="heavy_tailed")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64], help="curve: streams")
    parser.add_argument("--most-for-one", type=int, default=16, help="curve: streams where one goes at a time")
    parser.add_argument("--curve-rounds", type=int, default=3)
    parser.add_argument("--arrivals", type=int, default=600, help="first_token: requests of the Poisson process")
    parser.add_argument("--alone", type=int, default=150, help="first_token: requests of which each is alone")
    parser.add_argument("--share", type=float, default=0.7, help="first_token: of the saturated rate")
    parser.add_argument("--first-token-rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small loads, whatever else is said")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    if chosen.quick:
        vars(chosen).update(QUICK)
    return chosen


if __name__ == "__main__":
    main()
