"""Every Triton kernel, in every configuration that could be launched, compiles for the chips it is for, and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.aot import CHIPS, cases

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # most of one block, by the CUDA programming guide
Results = dict[str, dict[str, int | str]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """In another process, since this one interprets the kernels.

    What has not changed since the last run is taken from Triton's cache, which knows a kernel by its source, the
    functions it calls, its constants and options, and the compiler. A fresh checkout compiles all of them.
    """
    cache = request.config.cache
    folder = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    read: Results = json.loads(done.stdout)
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
