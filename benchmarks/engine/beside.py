"""Decode steps beside one busy loop, which takes a share of one core: how many times as long they take.

    python -m benchmarks.engine.beside               # batches of 1, 8 and 32, 15 rounds
    python -m benchmarks.engine.beside --rounds 5

Rounds alone and beside it take turns; it is stopped, not ended, while a step is measured alone. A program that takes
its fair share of one of C cores leaves C − 0.5 of them: on two, a step cannot take less than 1.33 times as long.
Writes `beside.json`: milliseconds of a step, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch

from benchmarks.common import figure, ratio, take_turns
from benchmarks.engine.widths import BATCHES, FLOAT32, MODEL, STEPS, TEXT, WIDTHS, Side
from benchmarks.report import report_head, results_folder, write_report

LOOP = "while True: pass"
REPEATED = 8  # rounds of steps in a measurement, which has to last for many time slices of the system


class BusyLoop:
    """Another program, which never waits."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", LOOP])
        self.pause()

    def pause(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    arguments = parse()
    head = report_head(["torch", "numba"])
    tokens = torch.tensor(list(TEXT.read_bytes())[: max(BATCHES) * (TEXT.stat().st_size // max(BATCHES))])
    loop = BusyLoop()
    try:
        with torch.inference_mode():
            side = Side(arguments.model, WIDTHS[FLOAT32], tokens)
            variants: dict[str, Callable[[], object]] = {}
            for batch in BATCHES:
                variants[f"alone, batch {batch}"] = partial(decode, side, batch)
                variants[f"beside, batch {batch}"] = partial(beside, loop, side, batch)
            times = take_turns(variants, arguments.rounds, clock=lambda variant: cast(float, variant()))
    finally:
        loop.end()
    report = {
        **head,
        "rounds": arguments.rounds,
        "figures": {
            name: figure([1e3 * seconds for seconds in measured], "ms", "lower") for name, measured in times.items()
        },
        "beside / alone": {
            str(batch): asdict(ratio(times[f"beside, batch {batch}"], times[f"alone, batch {batch}"]))
            for batch in BATCHES
        },
    }
    write_report(arguments.out / "beside.json", report)
    print(json.dumps(report, indent=2))


def decode(side: Side, batch: int) -> float:
    """Returns the seconds of a step."""
    start = time.perf_counter()
    for _ in range(REPEATED):
        side.decode(batch)
    return (time.perf_counter() - start) / (REPEATED * (STEPS // batch))


def beside(loop: BusyLoop, side: Side, batch: int) -> float:
    loop.resume()
    try:
        return decode(side, batch)
    finally:
        loop.pause()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


if __name__ == "__main__":
    main()
