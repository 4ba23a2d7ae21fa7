"""Comparing made-up results: what is planted is found, and noise is not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import figure, write_json
from benchmarks.compare import compare, figures, main, worse

ROUNDS = 9


def noisy(value: float, seed: int, spread: float = 0.03) -> list[float]:
    draw = random.Random(seed)
    return [value * draw.gauss(1.0, spread) for _ in range(ROUNDS)]


def results(seed: int, rate: float = 3000.0, wait: float = 40.0) -> dict[str, Any]:
    return {
        "date": "today",
        "against": {"sides": {"server": {"tokens_per_s": figure(noisy(rate, seed), "tokens/s", "higher")}}},
        "points": [
            {"streams": 1, "wait": figure(noisy(4.0, seed + 1), "ms", "lower")},
            {"streams": 64, "wait": figure(noisy(wait, seed + 2), "ms", "lower")},
        ],
    }


def folder(path: Path, report: dict[str, Any]) -> str:
    write_json(path / "server.json", report)
    return str(path)


@pytest.fixture
def before(tmp_path: Path) -> str:
    return folder(tmp_path / "before", results(1))


def test_every_figure_is_found_by_where_it_lies(before: str) -> None:
    assert list(figures(Path(before))) == [
        "server/against/sides/server/tokens_per_s",
        "server/points/streams=1/wait",
        "server/points/streams=64/wait",
    ]


def test_noise_is_no_regression(before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(10, 18):
        assert main([before, folder(tmp_path / "after", results(seed))]) == 0
    assert "3 of 3 figures are the same within the noise." in capsys.readouterr().out


@pytest.mark.parametrize(("planted", "name"), [({"rate": 2500.0}, "tokens_per_s"), ({"wait": 48.0}, "streams=64/wait")])
def test_a_planted_regression_is_found(
    planted: dict[str, float], name: str, before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = folder(tmp_path / "after", results(7, **planted))
    assert main([before, after]) == 1
    slower = [line for line in capsys.readouterr().out.splitlines() if line.startswith("slower")]
    assert len(slower) == 1
    assert name in slower[0]
    assert main([after, before]) == 0
    assert capsys.readouterr().out.startswith("faster")
    assert main([before, after, "--least", "0.5"]) == 0


def test_rounds_of_two_lengths_are_compared_by_their_intervals() -> None:
    one = {"value": 100.0, "low": 98.0, "high": 102.0, "unit": "ms", "better": "lower"}
    two = {"value": 110.0, "low": 107.0, "high": 113.0, "unit": "ms", "better": "lower"}
    found = worse(one, two)
    assert found.value == pytest.approx(1.1)
    assert 1.05 < found.low < 1.1 < found.high < 1.15
    assert worse({**one, "better": "higher"}, {**two, "better": "higher"}).high < 1


def test_pairs_see_through_what_slows_both() -> None:
    slow = [1.0, 1.5, 2.0, 1.2, 0.8]
    one, two = (figure([scale * each for each in slow], "ms", "lower") for scale in (10.0, 11.0))
    found = worse(one, two)
    assert 1.0 < found.low <= found.value == pytest.approx(1.1)


def test_what_is_not_the_same_quantity_is_not_compared(tmp_path: Path) -> None:
    one, two = {"a": figure([1.0, 2.0], "ms", "lower")}, {"a": figure([1.0, 2.0], "tokens/s", "higher")}
    assert compare(one, two) == []
    assert main([folder(tmp_path / "one", one), folder(tmp_path / "two", two)]) == 2
