from __future__ import annotations

from benchmarks.engine.sampling import KINDS, measure, worst


def test_every_kind_of_parameter_is_measured_for_one_row_and_for_all() -> None:
    found = measure(rows=3, vocabulary=16, known=5, repeats=1)
    drawn = {f"{kind}{how}" for kind in ("plain", "filtered") for how in ("", ", in torch")}
    assert set(found) == {*drawn, *(f"{rows} {kind}" for rows in (1, 3) for kind in KINDS)}
    assert all(milliseconds > 0 for milliseconds in found.values())


def test_the_worst_that_requests_may_ask_for_is_measured() -> None:
    found = worst(rows=2, vocabulary=16, repeats=1)
    assert set(found) == {"plain", "adjusting", "all", "stop strings, us a token"}
    assert all(figure > 0 for figure in found.values())
