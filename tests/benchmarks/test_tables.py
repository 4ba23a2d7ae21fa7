"""Tables that pages have of results: the dtypes of weights, and what was tried."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.common import figure
from benchmarks.reports import by_themselves, document, experiments, widths


def weights(dtype: str, loss: float, speed: float) -> dict[str, Any]:
    rates = {name: figure([speed], "tokens/s", "higher") for name in ("batch 1", "batch 32", "prompt")}
    return {"dtype": dtype, "loss": loss, "bytes": 2**20, "tokens_per_s": rates}


def test_the_dtypes_of_weights_stand_beside_the_first_one() -> None:
    report = {"weights": [weights("float32", 1.5, 1000.0), weights("int8", 1.50061, 1500.0)]}
    page = widths.rewritten("before\n<!-- weights -->\nold\n<!-- end of weights -->\nafter", report)
    assert "| `int8` | 1.5006 | 1.0 MiB | 1,500 (1.50) | 1,500 (1.50) | 1,500 (1.50) |" in page
    assert "old" not in page
    assert widths.rewritten(page, report) == page
    assert widths.TABLE.search(widths.PAGE.read_text()) is not None


def test_experiments_lie_above_the_suite_and_have_sections_of_their_own(tmp_path: Path) -> None:
    states = {"float32": 1.5, "int8, nearest": 1.51}
    losses = [
        {"window": 512, "states": name, "loss": loss, "by_position": {"0-128": loss}} for name, loss in states.items()
    ]
    of_states = {"contexts": 2, "tokens_of_a_context": 256, "losses": losses}
    (tmp_path / "int8-states.json").write_text(json.dumps(of_states))
    page = document.document(tmp_path / "suite", tmp_path)
    assert "| int8, nearest | +0.0100 | +0.0100 |" in page
    assert "[`int8-states.json`](./int8-states.json)" in page
    assert "## Tried: states written" not in page


def test_a_ring_is_set_beside_the_pass_in_place() -> None:
    parts = {name: figure([40.0], "µs", "lower") for name in ("in_place", "read", "dots", "flush")}
    row = {"batch": 8, "ring": 16, **parts, "by_bytes": 1.35, "ratio": {"value": 0.83, "low": 0.8, "high": 0.85}}
    page = "\n".join(experiments.ring({"rings": [row]}, ""))
    assert "| 8 | 16 | 40 | 40 | 40 | 40 | 1.35 | 0.83 (0.8 to 0.85) |" in page


@pytest.mark.parametrize("section", experiments.SECTIONS)
def test_a_section_is_named_as_the_file_that_its_benchmark_writes(section: str) -> None:
    module = Path(experiments.__file__).parents[1] / "engine" / f"{section.replace('-', '_')}.py"
    assert f'"{section}.json"' in module.read_text()


def test_results_of_this_checkout_have_their_sections() -> None:
    results = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads"
    page = document.document(results / "suite", results)
    for name in by_themselves.SECTIONS:
        assert f"[`{name}.json`](./{name}.json)" in page
    report = json.loads((results / "step.json").read_text())
    around = report["now"]["64 filtered"]["around"]["value"]
    assert f"| 64 filtered | {report['now']['64 filtered']['us']['forward']:,.0f} | {around:,.0f} (" in page
