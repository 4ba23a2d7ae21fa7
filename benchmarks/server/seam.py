"""What it costs that engines have processes of their own, and what several front ends bring.

    python -m benchmarks.server.seam             # some minutes
    python -m benchmarks.server.seam --rounds 1
    python -m benchmarks.server.seam --against ../before  # the engine process beside that of another checkout

First with an engine that computes nothing, as in `frontend.py`: the server in one process, with its engine in another,
and with two front ends before that. Once as fast as the processes can, where several tokens go out in one event, and
once `in step`, with so many steps a second that each token has an event of its own. Figures are tokens a second, and
microseconds of processor time that a token costs all processes of the server; what the seam costs is the difference.
The clients need processor time, too, so tokens a second are those of all processes on the cores there are. What two
front ends would bring with a core of its own for each process follows from processor time: the busiest process limits
the rate, and that is one process against the larger of the engine and each of the front ends, which have half of the
tokens each. Where a checkout is given, its two front ends take turns with the others. Then the bundled model, over
HTTP, with the engine in the server's process and in its own: tokens a second of so many streams. Systems take turns.
Writes `seam.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import ROOT
from benchmarks.client import COMPLETIONS
from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served
from benchmarks.server.frontend import AHEAD, BEFORE, PROMPT, WARM_TOKENS, System, turn

TWO = "two front ends"
SYSTEMS = {
    "one process": (),
    "an engine process": ("--replicas", "1"),
    TWO: ("--replicas", "1", "--workers", "2"),
}
PACED = {f"{name}, in step": (*options, "--pace", "0.02") for name, options in SYSTEMS.items()}
MODEL = {"one process": (), "an engine process": ("engine.replicas=1",)}
RATIOS = (
    "tokens_ratio_to_one_process",
    "two_front_ends_ratio_with_a_core_each",
    "two_front_ends_ratio_with_a_core_each_in_step",
    "bundled_model_ratio_to_one_process",
)
Figures = dict[str, float]


async def computing_nothing(
    systems: Mapping[str, Sequence[str]], streams: int, tokens: int, rounds: int, other: Path = ROOT
) -> dict[str, list[Figures]]:
    """One round more goes before those that count. Systems whose names end with BEFORE are of the checkout `other`."""
    found: dict[str, list[Figures]] = {name: [] for name in systems}
    crowd = ("--crowd", str(streams), "--ahead", str(AHEAD))
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(
                served(
                    module=("benchmarks.server.modelless", *crowd, *options),
                    root=other if name.endswith(BEFORE) else ROOT,
                )
            )
            for name, options in systems.items()
        }
        for number in range(rounds + 1):
            for name, server in running.items():
                system = System(name, COMPLETIONS, PROMPT)
                figures = await turn(name, system, server, streams, tokens if number else WARM_TOKENS)
                if number:
                    found[name].append(figures)
    return found


async def rate(server: Served, streams: int, tokens: int) -> float:
    """Tokens/s of `streams` completions at once."""
    begin = time.perf_counter()
    asked = [server.ask(prompt=f"Scene {number}.\n", max_tokens=tokens, seed=number) for number in range(streams)]
    responses = await asyncio.gather(*asked)
    return sum(len(each.tokens) for each in responses) / (time.perf_counter() - begin)


async def bundled_model(streams: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in MODEL}
    with ExitStack() as stack:
        running = {name: stack.enter_context(served(*options)) for name, options in MODEL.items()}
        for number in range(rounds + 1):
            for name, server in running.items():
                tokens_per_s = await rate(server, streams, tokens if number else tokens // 4)
                if number:
                    found[name].append(tokens_per_s)
    return found


def summary(nothing: Mapping[str, Sequence[Figures]], model: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    tokens = {name: [each["tokens_per_second"] for each in rounds] for name, rounds in nothing.items()}
    costs = {name: [each["server_us_per_token"] for each in rounds] for name, rounds in nothing.items()}
    one, remote, two = SYSTEMS
    one_in_step, _, two_in_step = PACED
    engines = {
        name: [each["engine_us_per_token"] for each in rounds]
        for name, rounds in nothing.items()
        if name not in (one, one_in_step)
    }
    busiest = {
        name: [max(each["engine_us_per_token"], each["front_us_per_token"] / 2) for each in nothing[name]]
        for name in (two, two_in_step)
    }
    return {
        "figures": {
            **{f"{name}: tokens/s": figure(rounds, "tokens/s", "higher") for name, rounds in tokens.items()},
            **{f"{name}: cost of a token": figure(rounds, "µs", "lower") for name, rounds in costs.items()},
            **{f"{name}: busiest process": figure(rounds, "µs", "lower") for name, rounds in busiest.items()},
            **{f"{name}: engine process": figure(rounds, "µs", "lower") for name, rounds in engines.items()},
            **{f"{name}: bundled model": figure(rounds, "tokens/s", "higher") for name, rounds in model.items()},
        },
        "seam_us_per_token": round(
            statistics.median(there - here for here, there in zip(costs[one], costs[remote], strict=True)), 2
        ),
        "tokens_ratio_to_one_process": {name: asdict(ratio(tokens[name], tokens[one])) for name in (remote, two)},
        "two_front_ends_ratio_with_a_core_each": asdict(ratio(costs[one], busiest[two])),
        "two_front_ends_ratio_with_a_core_each_in_step": asdict(ratio(costs[one_in_step], busiest[two_in_step])),
        "bundled_model_ratio_to_one_process": asdict(ratio(model[remote], model[one])),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.server.seam",
    )
    parser.add_argument("--crowd", type=int, default=256, help="streams, where nothing is computed")
    parser.add_argument("--tokens", type=int, default=250, help="of each")
    parser.add_argument("--streams", type=int, default=64, help="of the bundled model")
    parser.add_argument("--model-tokens", type=int, default=128, help="of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--against", type=Path, help="another checkout, whose engine process is measured beside this one's"
    )
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    head = report_head(["torch", "numba", "uvicorn", "uvloop", "msgspec"])
    nothing: dict[str, list[Figures]] = {}
    for systems in (SYSTEMS, PACED):
        if chosen.against is not None:
            before = {name + BEFORE: options for name, options in systems.items() if name.startswith(TWO)}
            systems = {**systems, **before}
        other = ROOT if chosen.against is None else chosen.against.resolve()
        nothing |= uvloop.run(computing_nothing(systems, chosen.crowd, chosen.tokens, chosen.rounds, other))
    model = uvloop.run(bundled_model(chosen.streams, chosen.model_tokens, chosen.rounds))
    report = {**head, **summary(nothing, model)}
    write_report(chosen.out / "seam.json", report)
    for name, value in report["figures"].items():
        print(f"{name}: {value['value']:.6g} {value['unit']}")
    for name in ("seam_us_per_token", *RATIOS):
        print(f"{name}: {report[name]}")


if __name__ == "__main__":
    main()
