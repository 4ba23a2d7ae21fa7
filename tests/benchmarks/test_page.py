"""The page's benchmark gets figures from a real browser, and a page that does not get all tokens has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs playwright")

from benchmarks.server import page


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium (apt-get install chromium)")
def test_measures_what_somebody_does_while_tokens_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SECONDS_BETWEEN", 0.0)
    page.main(["--tokens", "1500", "--rate", "500", "--runs", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "page.json").read_text())
    figures = report["figures"]["look"]
    assert report["events"] > 2
    assert 0 <= figures["input_delay_p95"]["value"] <= figures["paint_delay_p95"]["value"]
    assert figures["tokens_per_second"]["value"] > 0
    assert len(report["heap_mb"]["after"]) == 1
