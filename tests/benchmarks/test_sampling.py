from __future__ import annotations

from pathlib import Path

from bdh_batch.model import sampling
from benchmarks.sampling import KINDS, measure


def test_every_kind_of_wish_is_measured_for_one_row_and_for_all() -> None:
    found = measure(rows=3, vocabulary=16, known=5, repeats=1, old=Path(sampling.__file__))
    assert set(found) == {"plain", "before", *(f"{rows} {kind}" for rows in (1, 3) for kind in KINDS)}
    assert all(milliseconds > 0 for milliseconds in found.values())
