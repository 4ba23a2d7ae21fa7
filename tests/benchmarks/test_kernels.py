"""The CPU kernels' benchmark, with few sequences and few tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdh_batch.kernels.cpu import CpuKernels
from benchmarks.engine import kernels
from tests.kernels.support import CONFORMANCE

MODEL = str(CONFORMANCE / "tiny")
ARGUMENTS = ["--model", MODEL, "--batch", "2", "--context", "16", "--prompt", "32", "--repeats", "2"]


def test_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main([*ARGUMENTS, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    decode = report["decode"]
    for baseline in ("dense_per_sequence", "dense_batched", "recompute_at_16"):
        for step in ("step", "step_bfloat16"):
            times = decode[f"{step}_tokens_per_s"] / decode[f"{baseline}_tokens_per_s"]
            assert decode[f"{step}_times_{baseline}"] == pytest.approx(times)
    assert set(report["passes"]) == {"expand", "attend", "attend_bfloat16", "contract"}
    assert all(figures["percent_of_rate"] > 0 for figures in report["passes"].values())
    assert {file.name for file in tmp_path.glob("*.svg")} == {"kernels-passes.svg", "kernels-decode.svg"}


def test_prints_no_speed_while_a_result_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CpuKernels.logits
    monkeypatch.setattr(CpuKernels, "logits", lambda self, hidden: right(self, hidden) * 1.001)
    with pytest.raises(SystemExit, match="off the specification: no speed is printed"):
        kernels.main([*ARGUMENTS, "--out", str(tmp_path)])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
