"""Continuous against static batching, in process."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import asdict

from bdh_batch.engine.loading import load_engine
from bdh_batch.processes.model_settings import bundled_model
from bdh_batch.settings import load
from benchmarks.common import ratio
from benchmarks.engine.static import Job, continuous, heavy_tailed, ideal, static
from benchmarks.server.serving.common import Figures, print_scenario, refuse_unless, text


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
