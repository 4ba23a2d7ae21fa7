"""Starts one of the baselines; `python -m benchmarks.server.baselines --help`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvloop

from bdh_batch import settings
from bdh_batch.checkpoint.checkpoint import Model
from bdh_batch.engine.loading import LoadedEngine, attention_window, load_engine, start_worker
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.engine.worker import Observer
from bdh_batch.server import serve
from benchmarks.server import baselines
from benchmarks.server.baselines.batches import Batches
from benchmarks.server.baselines.recompute import RecomputeKernels

KINDS = ("upstream", "one-at-a-time", "static", "dense")
Load = Callable[[settings.Settings, Path], LoadedEngine]


def overrides_of(chosen: argparse.Namespace) -> list[tuple[str, str]]:
    """Options of the server; those that were asked for come last, and win."""
    found = [("server.port", str(chosen.port))]
    if chosen.model is not None:
        found.append(("model.path", str(chosen.model)))
    if chosen.kind == "dense":
        found.append(("engine.kernels", "torch"))
    else:
        found += [("scheduler.max_running", str(batch_of(chosen))), ("prefix_cache.enabled", "false")]
    return found + [(option, value) for option, _, value in (text.partition("=") for text in chosen.set)]


def batch_of(chosen: argparse.Namespace) -> int:
    batch: int = chosen.batch if chosen.kind == "static" else 1
    return batch


def load_upstream(chosen: settings.Settings, path: Path) -> LoadedEngine:
    engine = load_engine(chosen, path)
    return replace(engine, runner=recomputing(engine.model, chosen))


def recomputing(model: Model, chosen: settings.Settings) -> Runner:
    window = attention_window(chosen.model.attention_window, model.config)
    pool = StatePool(model.config, 1, model.weights.embed.device)  # nothing is kept there
    return Runner(RecomputeKernels(model.weights, window), pool)


def start_batches(
    most: int, patience: float, chosen: settings.Settings, engine: LoadedEngine, observer: Observer
) -> Batches:
    queued = chosen.scheduler.max_queued_requests
    return Batches(engine.runner, observer, min(most, engine.slots), patience, chosen.scheduler.prefill_tokens, queued)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server.baselines",
        description=baselines.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--model", type=Path, help="a model folder or file; else the bundled one")
    parser.add_argument("--batch", type=int, default=32, help="static: sequences of a batch")
    parser.add_argument("--wait-ms", type=float, default=20.0, help="static: how long a batch waits to be filled")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="any option of the server")
    chosen = parser.parse_args(argv)
    if chosen.batch < 1 or chosen.wait_ms < 0:
        parser.error("--batch should be at least 1, and --wait-ms not below 0")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    resolved = settings.load(None, overrides_of(chosen))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    load = load_upstream if chosen.kind == "upstream" else load_engine
    patience = chosen.wait_ms / 1e3 if chosen.kind == "static" else 0.0
    start = start_worker if chosen.kind == "dense" else partial(start_batches, batch_of(chosen), patience)

    def on_ready(url: str, model: str) -> None:
        print(f"{chosen.kind}: {model} at {url}", flush=True)

    uvloop.run(serve(resolved.settings, on_ready, load, start))


if __name__ == "__main__":
    main()
