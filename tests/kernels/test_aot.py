"""Every Triton kernel, in every configuration that could be launched, compiles for the chips it is for, and fits; those
that a decode step launches on an H100 or H200 spill nothing, and load while they compute."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")

from bdh_batch.kernels.cuda import LOGIT_DEPTH
from benchmarks.engine.gpu_compile import CHIPS, cases
from benchmarks.engine.gpu_kernels import CHIP, report_of, shown
from benchmarks.report import RESULTS

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # most of one block, by the CUDA programming guide
CASES = {case.name: case for case in cases()}
# Groups of loads that are under way while a program waits for the oldest: all of at least one further iteration.
IN_FLIGHT = {"encode_kernel": 2, "attend_token_kernel": 2, "contract_kernel": 2, "logits_kernel": 2}
SINES = "rotation_kernel"  # keeps the table of large angles, of which it has none, on its stack
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(compiled_ahead: str) -> Results:
    """From another process, since this one interprets the kernels."""
    read: Results = json.loads(compiled_ahead)
    return read


@pytest.mark.parametrize("chip", [f"sm_{chip}" for chip in CHIPS])
def test_every_kernel_compiles_and_fits(chip: str, results: Results) -> None:
    taken = {name: results[name][chip] for name in CASES}
    assert {name: each for name, each in taken.items() if not isinstance(each, dict)} == {}
    assert {name: each for name, each in taken.items() if each["shared"] > SHARED_MEMORY[chip]} == {}


def test_what_is_launched_spills_nothing_and_loads_ahead(results: Results) -> None:
    launched = [case for case in CASES.values() if case.default]
    assert launched
    for case in launched:
        taken = results[case.name][CHIP]
        assert taken["stack"] == 0 or case.kernel == SINES, case.name
        assert taken["in_flight"] >= IN_FLIGHT.get(case.kernel, 0) or case.shape.width <= LOGIT_DEPTH, case.name
        assert taken["programs"] >= (1 if case.kernel == "attend_chunk_kernel" else 2), case.name


def test_the_table_of_resources_is_that_of_these_kernels(results: Results) -> None:
    kept = [json.loads(file.read_text()) for file in RESULTS.glob("*/suite/gpu-kernels.json")]
    assert kept
    for report in kept:
        if report["versions"]["triton"] == version("triton"):
            made = json.loads(json.dumps(report_of(results, shown())))
            assert {key: report[key] for key in made} == made


def test_every_kernel_is_among_the_cases() -> None:
    from bdh_batch.kernels import triton_ops

    kernels = {name for name in vars(triton_ops) if name.endswith("_kernel")}
    assert {case.kernel for case in CASES.values()} == kernels
