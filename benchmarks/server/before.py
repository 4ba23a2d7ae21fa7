"""Tokens per second of this checkout and of an older one, by turns: engines in process, and servers over HTTP.

    python -m benchmarks.server.before ../before   # about five minutes a round

Both are asked by `bench serve` of this checkout; an engine in process is measured by its own checkout's benchmark.
Writes `before.json`: tokens/s by batch and by the types of weights and states, prompt tokens/s beside one prompt,
tokens/s over HTTP by streams and types, and the ratios of this one to the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.common import figure, ratio
from benchmarks.report import commit, report_head, results_folder, write_report
from benchmarks.served import served, start

BATCHES = (1, 8, 32, 64)
DTYPES = ("float32", "bfloat16")
STREAMS = (1, 32)
TOKENS = {1: 1000, 32: 200}  # of each completion, by the streams
OPTIONS = (
    "--dataset-name",
    "random",
    "--random-input-len",
    "32",
    "--ignore-eos",
    "--save-result",
)

Rates = dict[str, float]


def engine_benchmark(checkout: Path) -> str:
    """The module that measures an engine in process; before the benchmarks were in packages it had another name."""
    return "benchmarks.engine.throughput" if Path(checkout, "benchmarks", "engine").is_dir() else "benchmarks.engine"


def in_process(checkout: Path, dtype: str) -> Rates:
    """Tokens/s of its engine with weights and states of a type."""
    sizes = ["--batches", *map(str, BATCHES), "--decoders", "8", "--prompts", "1"]
    turns = ["--steps", "100", "--repeats", "5"]  # many, as threads have slept before each turn
    types = ["--dtype", dtype, "--state-dtype", dtype]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        what = ["--only", "batches", "mixes", *sizes, *turns, *types, "--out", folder]
        process = start([engine_benchmark(checkout), *what], checkout, log)
        if process.wait():
            log.seek(0)
            raise RuntimeError(log.read().decode())
        found = json.loads(Path(folder, "engine-cpu.json").read_bytes())
    rates = {f"in process, {dtype}, batch {each['batch']}": each["tokens_per_s"] for each in found["batches"]}
    (mix,) = found["mixes"]
    return rates | {f"in process, {dtype}, prompt tokens beside 8 streams": mix["prefilled_tokens_per_s"]}


def over_http(checkout: Path, dtype: str) -> Rates:
    """Tokens/s of its server with weights and states of a type, as its clients get them."""
    rates, types = {}, (f"model.dtype={dtype}", f"engine.state_dtype={dtype}")
    with served(*types, root=checkout) as server, tempfile.TemporaryDirectory() as folder:
        for streams in STREAMS:
            asked = ["--num-prompts", str(3 * streams), "--max-concurrency", str(streams)]
            asked += ["--num-warmups", str(3 * streams)]  # as many: states then lie in memory that was used before
            asked += ["--random-output-len", str(TOKENS[streams]), "--result-dir", folder, "--result-filename", "found"]
            program = [
                sys.executable,
                "-m",
                "bdh_batch",
                "bench",
                "serve",
                "--port",
                str(server.port),
                "--disable-tqdm",
            ]
            subprocess.run([*program, *OPTIONS, *asked], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            found = Path(folder, "found").read_bytes()
            rates[f"over HTTP, {dtype}, {streams} streams"] = json.loads(found)["output_throughput"]
    return rates


def all_of(checkout: Path) -> Rates:
    rates: Rates = {}
    for dtype in DTYPES:
        rates |= over_http(checkout, dtype) | in_process(checkout, dtype)
    return rates


def compared(rounds: Sequence[tuple[Rates, Rates]]) -> dict[str, dict[str, Any]]:
    """The rates of both sides, this one's first in each round, and their ratios."""
    figures = {}
    for name in rounds[0][0]:
        now, before = ([each[side][name] for each in rounds] for side in (0, 1))
        sides = {"now": figure(now, "tokens/s", "higher"), "before": figure(before, "tokens/s", "higher")}
        figures[name] = sides | {"ratio": asdict(ratio(now, before))}
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the older checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(arguments)
    head = report_head(["torch", "numba", "uvicorn"])
    figures = compared([(all_of(ROOT), all_of(chosen.other.resolve())) for _ in range(chosen.rounds)])
    for name, each in figures.items():
        print(f"{name:55} {each['before']['value']:9.0f} {each['now']['value']:9.0f} {each['ratio']['value']:6.2f}")
    write_report(chosen.out / "before.json", head | {"before": commit(chosen.other), "figures": figures})


if __name__ == "__main__":
    main()
