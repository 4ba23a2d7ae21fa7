"""Writes the table in docs/models.md of the dtypes that weights can have, from `loss.json`.

python -m benchmarks.reports.widths                  # from the folder that the page links to
python -m benchmarks.reports.widths --results folder
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdh_batch.system.sizes import size_text
from benchmarks import ROOT
from benchmarks.report import RESULTS

PAGE = ROOT / "docs" / "models.md"
MACHINE = "amd-epyc-2-threads"
TABLE = re.compile(r"(<!-- weights -->\n).*?(<!-- end of weights -->)", re.DOTALL)
HEAD = ("`model.dtype`", "nats a byte", "bytes", "tokens/s, alone", "32 at a time", "of a prompt")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speeds beside how many times those of the first row they are."""
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)]]
    for row in rows:
        speeds = [
            f"{speed['value']:,.0f} ({speed['value'] / rows[0]['tokens_per_s'][name]['value']:.2f})"
            for name, speed in row["tokens_per_s"].items()
        ]
        lines.append([f"`{row['dtype']}`", f"{row['loss']:.4f}", size_text(row["bytes"]), *speeds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewritten(page: str, report: Mapping[str, Any]) -> str:
    return TABLE.sub(lambda found: f"{found[1]}\n{table(report['weights'])}\n\n{found[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS / MACHINE, help="the folder with loss.json")
    report = json.loads((parser.parse_args().results / "loss.json").read_text("utf-8"))
    PAGE.write_text(rewritten(PAGE.read_text("utf-8"), report), "utf-8")


if __name__ == "__main__":
    main()
