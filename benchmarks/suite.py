"""All benchmarks of this machine, one after the other, and the page that tells of them: `make bench`.

    python -m benchmarks.suite               # about 20 minutes on two cores
    python -m benchmarks.suite --quick       # about two, into build/: whether everything works; its figures say nothing
    python -m benchmarks.suite --only server engine

Leaves the results and plots in benchmarks/results/<machine>/, and docs/performance.md. Let the machine do nothing else
meanwhile. `suite.json` has the commit, and how long each part took.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import document
from benchmarks.client import load_json
from benchmarks.common import machine_slug, report_head, write_json

ROOT = Path(__file__).parents[1]
MODEL = "models/bdh-shakespeare"
WINDOW = 512  # of the bundled model


@dataclass(frozen=True)
class Part:
    """A benchmark and its flags; `file` is what its --out names, where that is no folder."""

    flags: str
    quick: str
    file: str = ""


PARTS = {
    "kernels": Part(
        f"--model {MODEL} --context 128", f"--model {MODEL} --context 32 --repeats 3 --batch 4 --prompt 512"
    ),
    "engine": Part(
        f"--window {WINDOW} --repeats 21",
        f"--window {WINDOW} --repeats 3 --batches 1 4 --contexts 256 4096 --decoders 4 --prompts 0 1 --steps 2",
    ),
    "scheduler": Part("--steps 300", "--running 64 --waiting 64 --steps 20", "scheduler.json"),
    "frontend": Part("--rounds 5", "--rounds 2 --streams 8 --tokens 100", "frontend.json"),
    "serving": Part(
        "--only prompt keys --targets 100 25 --fresh --long 8192 --rounds 5 --running 256 --flood 300 --singles 15 "
        "--rounds-of-keys 4",
        "--only prompt keys --targets 25 --fresh --streams 4 --long 1024 --rounds 2 --running 16 --flood 24 "
        "--singles 2 --still 4 --single-tokens 32 --rounds-of-keys 2",
    ),
    "server": Part("", "--quick"),
}


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    report = {
        **report_head(["torch", "numba", "uvicorn", "uvloop"]),
        "commit": commit(),
        "quick": chosen.quick,
        "seconds": load_json(chosen.results / "suite.json").get("seconds", {}),
    }
    for name in chosen.only:
        print(f"{name} …", flush=True)
        began = time.perf_counter()
        run(name, chosen.results, chosen.quick)
        report["seconds"][name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {report['seconds'][name]:.0f} s", flush=True)
        write_json(chosen.results / "suite.json", report)
    document.main(["--results", str(chosen.results), "--out", str(chosen.page)])
    print(f"{chosen.page} and {chosen.results} have it all.")


def run(name: str, results: Path, quick: bool) -> None:
    """Ends the program where a benchmark fails, and leaves what it said."""
    part = PARTS[name]
    flags = part.quick if quick else part.flags
    results.mkdir(parents=True, exist_ok=True)
    out = os.path.relpath(results / part.file, ROOT)  # results tell their command, and no one's folders
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags.split(), "--out", out]
    with (results / f"{name}.log").open("w") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if ended:
        sys.exit(f"{' '.join(command)} ended with {ended}; {results / name}.log says why.")
    (results / f"{name}.log").unlink()


def commit() -> str:
    """With a mark where the files are not those of it; unknown in a copy without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.suite"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, help="the folder for JSON and plots")
    parser.add_argument("--page", type=Path, help="the file that is made from them")
    chosen = parser.parse_args(argv)
    quick = ROOT / "build" / "bench"
    chosen.results = chosen.results or (quick if chosen.quick else ROOT / "benchmarks" / "results" / machine_slug())
    chosen.page = chosen.page or (quick / "performance.md" if chosen.quick else ROOT / "docs" / "performance.md")
    chosen.results, chosen.page = chosen.results.resolve(), chosen.page.resolve()
    return chosen


if __name__ == "__main__":
    main()
