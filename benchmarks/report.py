"""Results as they are kept: what every one of them says about itself, where they lie, and the one way to write them.

    results/MACHINE/NAME.json         a run of one benchmark
    results/MACHINE/suite/NAME.json   a run of all of them: `make bench`

Needs torch alone, so that it also runs on a bare GPU machine.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT

RESULTS = ROOT / "benchmarks" / "results"
HEAD = ("command", "date", "machine", "versions")
COMMITS = ("commit", "committed_in")  # the latter: only the commit that added the result is known
UNKNOWN = "unknown"


def report_head(packages: Sequence[str], **machine: object) -> dict[str, Any]:
    """What every report begins with: the command, the commit, the day, the machine and the versions.

    To be called before anything is measured, as files may change meanwhile.

    Args:
        packages: whose versions matter.
        machine: what else is to be known of it.
    """
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "system": platform.platform(), **machine},
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in packages}},
    }


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # it came with another distribution, as in pytorch-triton
        return str(import_module(package).__version__)


def write_report(file: Path, report: Mapping[str, Any]) -> None:
    """Writes a result; the one way to do so.

    Raises:
        ValueError: neither the report nor each of its sections has all of what `report_head` gives.
    """
    if missing := missing_in(report):
        raise ValueError(f"{file.name}: a result should begin with its report_head, but there is no {missing[0]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")


def missing_in(report: Mapping[str, Any]) -> list[str]:
    """What a result does not say about itself. Where its sections were measured by themselves, each has a head."""
    sections = [part for part in report.values() if isinstance(part, dict)]
    lacking = [name for name in HEAD if not report.get(name)]
    lacking += [] if any(report.get(name) for name in COMMITS) else [COMMITS[0]]
    if lacking and sections and all(name in part for part in sections for name in HEAD):
        return [missing for part in sections for missing in missing_in(part)]
    return lacking


def load_json(file: Path) -> dict[str, Any]:
    """What a file holds, nothing where there is none."""
    held: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return held


def results_folder() -> Path:
    """Where the results of this machine lie."""
    return RESULTS / machine_slug()


def suite_folder() -> Path:
    """Where the results of a run of all benchmarks lie."""
    return results_folder() / "suite"


def machine_slug() -> str:
    """This machine as the name of a folder, as in amd-epyc-2-threads."""
    name = re.sub(r"\((r|tm)\)", " ", cpu_name().lower())
    return "-".join(re.findall("[a-z0-9]+", f"{name} {torch.get_num_threads()} threads"))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit(root: Path = ROOT) -> str:
    """The commit of a checkout, with `-dirty` where other files than results are not those of it; "unknown" outside."""
    try:
        top, head = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root.resolve():  # a copy inside of another checkout
            return UNKNOWN
        changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return f"{head}-dirty" if changed else head
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout
