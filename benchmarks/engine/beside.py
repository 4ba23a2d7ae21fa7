"""Forward passes of decode steps alone, and beside one busy loop that takes a share of one core.

    python -m benchmarks.engine.beside                     # the bundled model, batches of 1, 8, 32 and 64
    python -m benchmarks.engine.beside --against ../before  # beside the kernels of another checkout, by turns

A round is a process of its own, in which stretches alone and beside the loop take turns; the loop is stopped while a
step is measured alone. A program that takes its fair share of one of C cores leaves C − 0.5 of them: on two, a step
cannot take less than 1.33 times as long. Writes `beside.json`: milliseconds of a step, means as time is lost in few
steps that take long, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.cpu import CpuKernels
from benchmarks import ROOT
from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report

LOOP = "while True: pass"
TEXT = ROOT / "tests" / "data" / "shakespeare-validation.txt"
START = 64  # tokens that are in the states before steps are timed
STRETCHES = 3
ALONE, BESIDE = 0.3, 0.6  # seconds of a stretch: the system's time slices are of milliseconds
Times = dict[str, dict[str, float]]


class Steps:
    """A model, and the states of as many sequences as the largest batch has."""

    def __init__(self, model: Path, most: int) -> None:
        loaded = load_model(model, torch.float32, torch.device("cpu"))
        window = loaded.config.suggested_window
        self._kernels = CpuKernels(loaded.weights, window)
        self._states = StatePool(loaded.config, most, torch.device("cpu"), window).states.zero_()
        text = TEXT.read_bytes()
        self._tokens = torch.tensor(list(text[: most * (len(text) // most)])).view(most, -1)
        self._positions = cycle(range(START, self._tokens.shape[1]))
        self._forward(most, 0, START)

    def seconds(self, batch: int, stretch: float) -> list[float]:
        """The seconds of each step in a stretch of so many."""
        found: list[float] = []
        end = time.perf_counter() + stretch
        while time.perf_counter() < end:
            found.append(self._forward(batch, next(self._positions), 1))
        return found

    def _forward(self, batch: int, start: int, length: int) -> float:
        tokens = self._tokens[:batch, start : start + length].flatten()
        positions = torch.arange(start, start + length).repeat(batch)
        bounds = [length * each for each in range(batch + 1)]
        ragged = RaggedBatch(tokens, positions, bounds, list(range(batch)))
        before = time.perf_counter()
        self._kernels.forward(self._states, ragged)
        return time.perf_counter() - before


def one_round(model: Path, batches: Sequence[int]) -> Times:
    """Milliseconds of a step, by batch, alone and beside the loop."""
    found: Times = {}
    with torch.inference_mode(), subprocess.Popen([sys.executable, "-c", LOOP]) as loop:
        try:
            loop.send_signal(signal.SIGSTOP)
            steps = Steps(model, max(batches))
            for batch in batches:
                alone, beside = [], []
                steps.seconds(batch, ALONE)
                for _ in range(STRETCHES):
                    alone += steps.seconds(batch, ALONE)
                    loop.send_signal(signal.SIGCONT)
                    beside += steps.seconds(batch, BESIDE)
                    loop.send_signal(signal.SIGSTOP)
                found[str(batch)] = {"alone": 1e3 * statistics.mean(alone), "beside": 1e3 * statistics.mean(beside)}
        finally:
            loop.kill()
    return found


def round_of(checkout: Path, model: Path, batches: Sequence[int]) -> Times:
    """A round in a process of its own, with this benchmark and the package of `checkout`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, source in {"bdh_batch": checkout, "benchmarks": ROOT, "tests": ROOT}.items():
            Path(folder, name).symlink_to(source.resolve() / name)
        command = [sys.executable, "-P", "-m", "benchmarks.engine.beside", "--model", str(model.resolve())]
        done = subprocess.run(
            [*command, "--batches", *map(str, batches), "--print-only"],
            env=os.environ | {"PYTHONPATH": folder}, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    found: Times = json.loads(done.stdout)
    return found


def summary(rounds: Sequence[Times]) -> dict[str, Any]:
    """Of each batch: the milliseconds of a step, and how many times as long it takes beside the loop."""
    found = {}
    for batch in rounds[0]:
        alone, beside = ([each[batch][name] for each in rounds] for name in ("alone", "beside"))
        figures = {"alone": figure(alone, "ms a step", "lower"), "beside": figure(beside, "ms a step", "lower")}
        found[batch] = figures | {"beside / alone": asdict(ratio(beside, alone))}
    return found


def speed_ups(found: dict[str, list[Times]]) -> dict[str, Any]:
    """How many times as long a step took before, by batch, alone and beside the loop."""
    return {
        batch: {
            name: asdict(ratio([each[batch][name] for each in found["before"]], [each[batch][name] for each in rounds]))
            for name in ("alone", "beside")
        }
        for rounds in [found["now"]]
        for batch in rounds[0]
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "bdh-shakespeare")
    parser.add_argument("--against", type=Path, help="another checkout, whose kernels are measured beside this one's")
    parser.add_argument("--print-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(arguments)
    if chosen.print_only:
        print(json.dumps(one_round(chosen.model, chosen.batches)))
        return
    head = report_head(["torch", "numba"])
    checkouts = {"now": ROOT, **({} if chosen.against is None else {"before": chosen.against})}
    found: dict[str, list[Times]] = {name: [] for name in checkouts}
    for _ in range(chosen.rounds):
        for name, checkout in checkouts.items():
            found[name].append(round_of(checkout, chosen.model, chosen.batches))
    report: dict[str, Any] = {name: summary(rounds) for name, rounds in found.items()}
    if "before" in found:
        report["before / now"] = speed_ups(found)
    for name, batches in report.items():
        for batch, figures in batches.items():
            values = (f"{key} {value['value']:.2f}" for key, value in figures.items())
            print(f"{name:14}{batch:4}", "  ".join(values))
    write_report(chosen.out / "beside.json", head | {"rounds": chosen.rounds} | report)


if __name__ == "__main__":
    main()
