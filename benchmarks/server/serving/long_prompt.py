"""Streams decode, and a long prompt arrives: what becomes of the gaps between their tokens."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from bdh_batch.bench.strain import Watch
from benchmarks.client import Response, Stream
from benchmarks.common import figure, ratio
from benchmarks.served import Served, served
from benchmarks.server.serving.common import (
    GREEDY,
    Figures,
    Window,
    percentile,
    print_scenario,
    refuse_unless,
    strained,
    text,
    use_all_slots,
)

ENDLESS = 100_000  # tokens asked for by streams that decode until their client leaves


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


def gaps(responses: Sequence[Response], window: Window) -> list[float]:
    """Between tokens of a stream, all that lie in `window`."""
    begin, end = window
    return [b - a for response in responses for a, b in pairwise(response.times) if begin <= a and b <= end]
