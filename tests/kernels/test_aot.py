"""Every Triton kernel, in every configuration that could be launched, compiles for the chips it is for, and fits."""

from __future__ import annotations

import json
import sys

import pytest

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.aot import CHIPS, cases

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # most of one block, by the CUDA programming guide
Results = dict[str, dict[str, int | str]]


@pytest.fixture(scope="module")
def results(compiled_ahead: str) -> Results:
    """From another process, since this one interprets the kernels."""
    read: Results = json.loads(compiled_ahead)
    return read


@pytest.mark.parametrize("chip", [f"sm_{chip}" for chip in CHIPS])
@pytest.mark.parametrize("name", [case.name for case in cases()])
def test_compiles_and_fits(name: str, chip: str, results: Results) -> None:
    bytes_taken = results[name][chip]
    assert isinstance(bytes_taken, int), bytes_taken
    assert bytes_taken <= SHARED_MEMORY[chip]


def test_every_kernel_is_among_the_cases() -> None:
    from bdh_batch.kernels import triton_ops

    kernels = {name for name in vars(triton_ops) if name.endswith("_kernel")}
    assert {case.kernel for case in cases()} == kernels
