"""All benchmarks of this machine, one after the other, and the page that shows them: `make bench`.

    python -m benchmarks.reports.suite          # about 20 minutes on two cores
    python -m benchmarks.reports.suite --quick  # about three, into build/: whether it works; its figures say nothing
    python -m benchmarks.reports.suite --only server engine

What is short is repeated, between the scenarios of what is long: a machine is faster in some minutes than in others,
and its figures show that by their intervals (`pool.py`). A scenario is measured once, in rounds that take minutes.

Leaves results and plots in benchmarks/results/<machine>/suite/, docs/performance.md and the README's picture. Let the
machine do nothing else meanwhile. `suite.json` has the commit of each part, and how long it took. What was measured
before a failure stays in a folder of its own, which is named.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.engine import kernels, throughput as engine
from benchmarks.report import load_json, report_head, suite_folder, write_report
from benchmarks.reports import document, picture
from benchmarks.reports.pool import pooled
from benchmarks.server import throughput as server
from benchmarks.server.serving import drawing as serving

MODEL = "models/bdh-shakespeare"
WINDOW = 512  # of the bundled model
Report = dict[str, Any]


@dataclass(frozen=True)
class Flags:
    """Of a benchmark, in earnest and in a quick run."""

    full: str
    quick: str

    def chosen(self, quick: bool) -> list[str]:
        return (self.quick if quick else self.full).split()


SHORT = {  # each a repetition
    "kernels": Flags(
        f"--model {MODEL} --context 128 --repeats 3",
        f"--model {MODEL} --context 32 --repeats 3 --batch 4 --prompt 512",
    ),
    "engine": Flags(
        f"--window {WINDOW} --repeats 5",
        f"--window {WINDOW} --repeats 3 --batches 1 4 --contexts 256 4096 --decoders 4 --prompts 0 1 --steps 2",
    ),
    "scheduler": Flags("--steps 100", "--running 64 --waiting 64 --steps 20"),
    "frontend": Flags("--rounds 1", "--rounds 1 --streams 8 --tokens 100"),
}
SCENARIOS = {  # each after a repetition of all that is short
    ("server", "against"): Flags("", "--quick"),
    ("serving", "prompt"): Flags(
        "--targets 100 25 --fresh --long 8192 --rounds 5",
        "--targets 25 --fresh --streams 4 --long 1024 --rounds 2",
    ),
    ("server", "heavy_tailed"): Flags("", "--quick"),
    ("serving", "keys"): Flags(
        "--running 256 --flood 300 --singles 15 --rounds-of-keys 4",
        "--running 16 --flood 24 --singles 2 --still 4 --single-tokens 32 --rounds-of-keys 2",
    ),
    ("server", "curve"): Flags("", "--quick"),
    ("server", "first_token"): Flags("", "--quick"),
}
MODULES = {
    "kernels": "benchmarks.engine.kernels",
    "engine": "benchmarks.engine.throughput",
    "scheduler": "benchmarks.engine.scheduler",
    "frontend": "benchmarks.server.frontend",
    "server": "benchmarks.server.throughput",
    "serving": "benchmarks.server.serving",
}
PARTS = [*SHORT, *dict.fromkeys(part for part, _ in SCENARIOS)]
DRAWINGS: dict[str, Callable[[Path, Report], None]] = {
    "kernels-cpu.json": kernels.draw,
    "engine-cpu.json": engine.draw,
    "serving.json": serving.draw,
    "server.json": server.draw,
}


@dataclass(frozen=True)
class Repetition:
    """One run of one benchmark."""

    part: str
    flags: Sequence[str]


def repetitions(only: Sequence[str], quick: bool) -> Iterator[Repetition]:
    """In the order in which they come."""
    for number, ((part, scenario), flags) in enumerate(SCENARIOS.items()):
        if not (quick and number > 1):  # two show whether they can be pooled
            yield from (Repetition(name, each.chosen(quick)) for name, each in SHORT.items() if name in only)
        if part in only:
            yield Repetition(part, ["--only", scenario, *flags.chosen(quick)])


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    chosen.results.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="repetitions-", dir=chosen.results))
    head = report_head(["torch", "numba", "uvicorn", "uvloop"])
    of_this = {"commit": head["commit"], "quick": chosen.quick}  # before anything runs: files may change meanwhile
    seconds: Counter[str] = Counter()
    planned = [*repetitions(chosen.only, chosen.quick)]
    for number, repetition in enumerate(planned):
        print(f"{number + 1} of {len(planned)}: {repetition.part}", flush=True)
        began = time.perf_counter()
        repeat(repetition, folder / f"{number:02}")
        seconds[repetition.part] += round(time.perf_counter() - began)
    gather(folder, chosen.results, head["command"])
    parts = load_json(chosen.results / "suite.json").get("parts", {})
    parts |= {name: {**of_this, "seconds": each} for name, each in seconds.items()}
    quick = any(part["quick"] for part in parts.values())
    write_report(chosen.results / "suite.json", {**head, "quick": quick, "parts": parts})
    document.main(["--results", str(chosen.results), "--out", str(chosen.page)])
    if (chosen.results / picture.SERVER).is_file():
        picture.main(["--results", str(chosen.results), "--out", str(chosen.page.with_name("throughput.svg"))])
    print(f"{chosen.page} and {chosen.results} have it all.")


def repeat(repetition: Repetition, folder: Path) -> None:
    """Ends the program where a benchmark fails, and leaves what it said."""
    folder.mkdir(parents=True)
    out = os.path.relpath(folder, ROOT)
    command = [sys.executable, "-m", MODULES[repetition.part], *repetition.flags, "--out", out]
    log = folder / "log"
    with log.open("w") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            ended = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # so that it ends its servers
            raise
    if ended:
        sys.exit(f"{' '.join(command)} ended with {ended}; {log} says why.")


def gather(repetitions: Path, results: Path, command: str) -> None:
    """Makes one report of those of a name, and its plots; then the repetitions may go."""
    parts: defaultdict[str, list[Report]] = defaultdict(list)
    for file in sorted(repetitions.glob("*/*.json")):
        parts[file.name].append(load_json(file))
    for name, each in parts.items():
        report = pooled(each)
        write_report(results / name, {**report, "command": command, "sittings": len(each)})
        if name in DRAWINGS:
            DRAWINGS[name](results, report)
    shutil.rmtree(repetitions)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.reports.suite",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, help="the folder for JSON and plots")
    parser.add_argument("--page", type=Path, help="the file that is made from them")
    chosen = parser.parse_args(argv)
    quick = ROOT / "build" / "bench"
    chosen.results = chosen.results or (quick if chosen.quick else suite_folder())
    chosen.page = chosen.page or (quick / "performance.md" if chosen.quick else ROOT / "docs" / "performance.md")
    chosen.results, chosen.page = chosen.results.resolve(), chosen.page.resolve()
    return chosen


if __name__ == "__main__":
    main()
