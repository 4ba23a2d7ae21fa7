"""What programs of the Triton kernels take on a GPU, as compiled for it, and what a decode step would take on paper.

    python -m benchmarks.engine.gpu_kernels     # some minutes; nothing is measured, so any machine will do

Needs no GPU. Leaves gpu-kernels.json in benchmarks/results/MACHINE/suite.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from bdh_batch.kernels.cuda import constants
from bdh_batch.kernels.tuning import Blocks
from benchmarks.engine.gpu_compile import UPSTREAM, Case, cases, results_of
from benchmarks.engine.gpu_estimate import estimates
from benchmarks.report import report_head, suite_folder, write_report

CHIP = "sm_90"  # of H100 and H200


def shown() -> dict[str, dict[str, Case]]:
    """The kernels that upstream's default model is computed with where nothing was tuned, by dtype and name.

    States are as wide as the weights.
    """
    by_name = {case.name: case for case in cases()}
    found: dict[str, dict[str, Case]] = {}
    for dtype, kernel in product(("bf16", "fp32"), constants(UPSTREAM, Blocks())):
        case = by_name.get(f"upstream-{kernel}-{dtype}-states") or by_name[f"upstream-{kernel}-{dtype}"]
        found.setdefault(dtype, {})[kernel.removesuffix("_kernel")] = case
    return found


def report_of(results: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, Mapping[str, Case]]) -> dict[str, Any]:
    """What goes into the file, without its head.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    resources: dict[str, dict[str, dict[str, int]]] = {}
    for dtype, kernels in chosen.items():
        for name, case in kernels.items():
            taken = results[case.name][CHIP]
            if isinstance(taken, str):
                raise RuntimeError(f"{case.name}: {taken}")  # noqa: TRY004  what the compiler raised
            resources.setdefault(dtype, {})[name] = taken
    blocks = {dtype: asdict(next(iter(kernels.values())).blocks) for dtype, kernels in chosen.items()}
    model = {"layers": UPSTREAM.layers, "heads": UPSTREAM.heads, "width": UPSTREAM.width, "neurons": UPSTREAM.neurons}
    return {
        "chip": CHIP,
        "model": model,
        "blocks": blocks,
        "resources": resources,
        "estimates": estimates(resources["bf16"], blocks["bf16"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles the Triton kernels, and writes what programs of them take.")
    parser.add_argument("--out", type=Path, default=suite_folder() / "gpu-kernels.json")
    out = parser.parse_args().out
    os.environ["TRITON_INTERPRET"] = "0"  # in the processes that compile
    head = report_head(["torch", "triton"])
    chosen = shown()
    results = results_of([case for kernels in chosen.values() for case in kernels.values()])
    write_report(out, {**head, **report_of(results, chosen)})
    print(f"written to {out}")


if __name__ == "__main__":
    main()
