from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdh_batch.checkpoint.config import BDHConfig
from benchmarks.engine import peer


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8, vocab_size=32)
    monkeypatch.setattr(peer, "CONFIG", config)
    monkeypatch.setattr(peer, "ROTARY", 8)


def test_measures_both(tmp_path: Path) -> None:
    peer.main(["--batches", "1", "3", "--rounds", "1", "--tokens", "2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "peer.json").read_text())
    for batch in ("1", "3"):
        row = report["batches"][batch]
        expected = row["bdh-batch"]["value"] / row["bdh-cq"]["value"]
        assert row["times as fast"]["value"] == pytest.approx(expected)


def test_measures_nothing_where_they_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peer, "drawn", lambda runner, segments: [0] * len(segments))
    with pytest.raises(SystemExit, match="batch 1: the package says something else"):
        peer.main(["--batches", "1", "--rounds", "1", "--out", str(tmp_path)])
    assert not [*tmp_path.iterdir()]
