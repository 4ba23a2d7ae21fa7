"""The engine's benchmark, with a model and arguments so small that it takes a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.engine import throughput as engine
from tests.kernels.support import CONFORMANCE

ARGUMENTS = (
    f"--model {CONFORMANCE / 'tiny'} --kernels torch --batches 1 3 --contexts 8 4096 --context-batch 2 "
    "--decoders 3 --prompts 0 2 --prefill-tokens 8 --steps 2 --repeats 3"
).split()
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def measured(*more: str) -> dict[str, Any]:
        engine.main([*ARGUMENTS, "--out", str(tmp_path), *more])
        report: dict[str, Any] = json.loads((tmp_path / "engine-cpu.json").read_text())
        return report

    return measured


def test_measures_all_and_draws_it(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run()
    assert [row["batch"] for row in report["batches"]] == [1, 3]
    assert [row["context"] for row in report["contexts"]["by_context"]] == [8, 4096]
    assert [row["prompts"] for row in report["mixes"]] == [0, 2]
    assert report["mixes"][0]["prefilled_tokens_per_s"] == 0
    for row in report["batches"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 1e3 / row["ms_per_step"])
    far = report["contexts"]["by_context"][1]["ratio_to_8"]
    assert 0 < far["low"] <= far["value"] <= far["high"]
    assert {file.name for file in tmp_path.glob("*.svg")} == {"engine-batches.svg", "engine-contexts.svg"}
    assert "3 decode, 2 in their prompts" in capsys.readouterr().out


def test_a_mix_is_what_it_says(run: Run) -> None:
    """In every step all decoders get a token and the prompts fill their share, to the last step of the last run."""
    (mix,) = (row for row in run("--only", "mixes")["mixes"] if row["prompts"] == 2)
    seconds_per_step = mix["ms_per_step"] / 1e3
    assert mix["decoded_tokens_per_s"] * seconds_per_step == pytest.approx(3)
    assert mix["prefilled_tokens_per_s"] * seconds_per_step == pytest.approx(8)


def test_measures_only_what_is_asked_for(run: Run, tmp_path: Path) -> None:
    report = run("--only", "contexts", "--exact", "--contexts", "16", "32")
    assert report["contexts"]["exact"]
    assert "batches" not in report
    assert "mixes" not in report
    assert [file.name for file in tmp_path.glob("*.svg")] == ["engine-contexts.svg"]


def test_measures_with_a_window(run: Run) -> None:
    report = run("--only", "contexts", "--window", "16")
    assert report["attention_window"] == 16
    assert [row["context"] for row in report["contexts"]["by_context"]] == [8, 4096]


class Wrong(TorchKernels):
    """Off by one part in a thousand, and only in a decode step."""

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        hidden = super().forward(states, batch, active, fired)
        return hidden * 1.001 if len(batch.slots) == len(batch.tokens) else hidden


def test_prints_no_speed_while_a_result_is_wrong(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(name: str, weights: Weights, window: int) -> tuple[TorchKernels, str]:
        return Wrong(weights, window), "wrong"

    monkeypatch.setattr(engine, "select_kernels", wrong)
    with pytest.raises(SystemExit, match="off the specification: no speed is worth printing"):
        run()
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
