"""The GPU check is run where there is a GPU; what of it needs none is tested here."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ROOT
from benchmarks.engine import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().out == "gpu-check: there is no GPU on this machine, nothing was measured\n"


def test_each_part_is_written_as_it_ends_and_one_without_memory_or_time_stops_no_other() -> None:
    now, written = iter(range(100)), []

    def full(left: float) -> gpu_check.Figures:
        raise torch.OutOfMemoryError("no memory\nand how it came")

    parts: dict[str, gpu_check.Part] = {"one": lambda left: {"left": left}, "full": full, "late": lambda left: {}}
    found = gpu_check.run_parts(parts, 7, lambda each: written.append(list(each)), lambda: float(next(now)))
    assert found == {
        "one": {"left": 6, "seconds": 1},
        "full": {"out_of_memory": "no memory", "seconds": 1},
        "late": {"left_out": "no time was left", "seconds": 1},
    }
    assert written == [["one"], ["one", "full"], ["one", "full", "late"]]


def test_a_wrong_result_ends_the_check_and_is_written() -> None:
    written: list[gpu_check.Figures] = []

    def wrong(left: float) -> gpu_check.Figures:
        raise gpu_check.WrongResultError("0.3 off")

    with pytest.raises(gpu_check.WrongResultError):
        gpu_check.run_parts({"errors": wrong, "decode": lambda left: {}}, 60, written.append)
    assert written[-1]["errors"]["wrong"] == "0.3 off"
    assert list(written[-1]) == ["errors"]


def test_needs_little() -> None:
    """A bare GPU machine has no plots and no progress bars: neither itself nor what it imports may ask for them."""
    seen: set[str] = set()
    found: set[str] = set()
    waiting = [gpu_check.__name__]
    while waiting:
        seen.add(module := waiting.pop())
        for name in imported(file_of(module)):
            if name.split(".")[0] == "benchmarks":
                waiting += {name} - seen
            else:
                found.add(name.split(".")[0])
    assert {"benchmarks.common", "benchmarks.report"} <= seen
    assert found - sys.stdlib_module_names <= {"bdh_batch", "torch", "triton", "numpy", "numba", "safetensors"}


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names
