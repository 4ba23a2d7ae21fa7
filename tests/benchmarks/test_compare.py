"""Comparing made-up results: what is planted is found, and noise is not."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import figure
from benchmarks.reports.compare import compare, figures, main, of_intervals, reports
from benchmarks.reports.noise import each_share, ratios, student
from tests.benchmarks.support import write_json

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
    assert list(figures(reports(Path(before)))) == [
        "server/against/sides/server/tokens_per_s",
        "server/points/streams=1/wait",
        "server/points/streams=64/wait",
    ]


def test_noise_is_no_regression(before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(10, 18):
        assert main([before, folder(tmp_path / "after", results(seed))]) == 0
    assert "3 of 3 are the same within the noise." in capsys.readouterr().out


@pytest.mark.parametrize(("planted", "name"), [({"rate": 2500.0}, "tokens_per_s"), ({"wait": 48.0}, "streams=64/wait")])
def test_a_planted_regression_is_found(
    planted: dict[str, float], name: str, before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = folder(tmp_path / "after", results(7, **planted))
    assert main([before, after]) == 1
    printed = capsys.readouterr().out.splitlines()
    slower = [line for line in printed if line.startswith("slower") and "together" not in line]
    assert len(slower) == 1
    assert name in slower[0]
    assert main([after, before]) == 0
    assert "\nfaster: " in capsys.readouterr().out
    assert main([before, after, "--least", "0.5"]) == 0


def many(seed: int, factor: float) -> dict[str, Any]:
    """Costs and rates, of which each is noisier than what is planted in all of them."""
    draw = random.Random(seed)
    rounds = [[factor * math.exp(draw.gauss(0.0, 0.1)) for _ in range(6)] for _ in range(12)]
    costs = {f"cost {i}": figure(each, "ms", "lower") for i, each in enumerate(rounds)}
    rates = {f"rate {i}": figure([1 / value for value in each], "1/ms", "higher") for i, each in enumerate(rounds)}
    return {"costs": costs, "rates": rates}


def test_what_is_slower_in_many_figures_is_seen_though_it_is_the_noise_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, equal, slower = (
        folder(tmp_path / name, many(seed, factor))
        for name, seed, factor in (("before", 1, 1.0), ("equal", 2, 1.0), ("slower", 3, 1.15))
    )
    assert main([before, equal]) == 0
    capsys.readouterr()
    assert main([before, slower]) == 1
    found = [line.split(":")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("slower")]
    assert {" server/costs, 12 together", " server/rates, 12 together"} <= set(found)
    assert len(found) < 8  # of 24 by themselves


def test_rows_go_by_as_many_entries_as_tell_them_apart() -> None:
    held = figure([3.0, 4.0], "ms", "lower")
    mixes = [{"decoders": 32, "prompts": prompts, "speed": 2.5 * prompts, "figure": held} for prompts in (0, 1, 4)]
    equal = [{"decoders": 32, "speed": speed, "figure": held} for speed in (1.5, 2.5)]
    targets = [{"target": 100.0, "other": 1, "figure": held}, {"target": 25.0, "other": 1, "figure": held}]
    bare = [held, [held]]
    assert list(figures({"a": {"mixes": mixes, "equal": equal, "targets": targets, "bare": bare}})) == [
        *(f"a/mixes/decoders=32,prompts={prompts}/figure" for prompts in (0, 1, 4)),
        *(f"a/equal/decoders=32,{number}/figure" for number in (0, 1)),
        *(f"a/targets/target={target}/figure" for target in (100.0, 25.0)),
        *("a/bare/0", "a/bare/1/0"),
    ]
    with pytest.raises(ValueError, match="two figures would go by the name a/b/c"):
        figures({"a": {"b/c": held, "b": {"c": held}}})


def test_what_vanished_is_a_fault_and_what_is_new_is_none(
    before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = results(1)
    del report["points"][0]
    less = folder(tmp_path / "less", report)
    assert main([before, less]) == 1
    assert "missing in B: server/points/streams=1/wait\n" in capsys.readouterr().out
    assert main([less, before]) == 0
    assert "Figures only in B: 1.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "two", "code", "reason"),
    [
        ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], 0, "not all of it is above 0 in A"),
        ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0], 1, "not all of it is above 0 in B"),
        ([1.0], [9.0], 0, "a single round does not show its noise"),
    ],
)
def test_what_has_no_ratio_is_reported(
    one: list[float], two: list[float], code: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        folder(tmp_path / name, {**results(1), "odd": figure(rounds, "ms", "lower")})
        for name, rounds in (("one", one), ("two", two))
    ]
    assert main(folders) == code
    assert f"cannot be compared: server/odd: {reason}\n" in capsys.readouterr().out


def test_a_quick_run_is_not_compared_with_a_full_one(before: str, tmp_path: Path) -> None:
    quick = folder(tmp_path / "quick", {**results(1), "command": "python -m benchmarks.server.throughput --quick"})
    suite = folder(tmp_path / "suite", results(1))
    write_json(Path(suite) / "suite.json", {"quick": True})
    assert [main([before, quick]), main([suite, before]), main([quick, suite])] == [2, 2, 0]


def test_another_machine_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (folder(tmp_path / cpu, {**results(1), "machine": {"cpu": cpu}}) for cpu in ("old", "new"))
    assert main([one, one]) == 0
    assert not capsys.readouterr().err
    assert main([one, two]) == 0
    assert capsys.readouterr().err == "Warning: only one of them is of new, old.\n"


def drawn(draw: random.Random, spreads: Sequence[float], rounds: int, factor: float = 1.0) -> list[list[float]]:
    return [[factor * math.exp(draw.gauss(0.0, spread)) for _ in range(rounds)] for spread in spreads]


@pytest.mark.parametrize("rounds", [3, 4, 9])
@pytest.mark.parametrize("spreads", [[0.1] * 52, [0.01, 0.05, 0.2, 0.1] * 4], ids=["alike", "unlike"])
def test_equal_runs_of_few_rounds_are_mostly_the_same(rounds: int, spreads: list[float]) -> None:
    """Even with no allowance for what is no matter."""
    draw, flagged = random.Random(rounds), 0
    for _ in range(200):
        pairs = list(zip(drawn(draw, spreads, rounds), drawn(draw, spreads, rounds), strict=True))
        flagged += any(found.low > 1 or found.high < 1 for found in ratios(pairs, each_share(len(pairs))))
    assert flagged <= 20


def test_a_slowdown_to_half_is_found_in_three_rounds_of_many_figures() -> None:
    draw = random.Random(5)
    for _ in range(20):
        one, two = (
            {str(number): figure(each, "ms", "lower", draws=100) for number, each in enumerate(run)}
            for run in (
                drawn(draw, [0.1] * 52, 3),
                drawn(draw, [0.1], 3, 2.0) + drawn(draw, [0.1] * 51, 3),
            )
        )
        assert "slower" in [change.verdict(0.05) for change in compare(one, two) if change.name == "0"]


@pytest.mark.parametrize(
    ("share", "freedom", "found"), [(0.95, 4, 2.7764), (0.999, 2, 31.599), (0.95, 1, 12.706), (0.95, 1000, 1.9623)]
)
def test_students_t_is_that_of_tables(share: float, freedom: float, found: float) -> None:
    assert student(share, freedom) == pytest.approx(found, rel=1e-4)


def test_figures_without_rounds_are_compared_by_their_intervals() -> None:
    one = {"value": 100.0, "low": 98.0, "high": 102.0, "unit": "ms", "better": "lower"}
    two = {"value": 110.0, "low": 107.0, "high": 113.0, "unit": "ms", "better": "lower"}
    (found,) = [change.ratio for change in compare({"a": one}, {"a": two})]
    assert found.value == pytest.approx(1.1)
    assert 1.05 < found.low < 1.1 < found.high < 1.15
    assert compare({"a": {**one, "better": "higher"}}, {"a": {**two, "better": "higher"}})[0].ratio.high < 1
    assert of_intervals(two, one, 0.99).low < found.low


def test_what_is_not_the_same_quantity_is_not_compared(tmp_path: Path) -> None:
    one, two = {"a": figure([1.0, 2.0], "ms", "lower")}, {"a": figure([1.0, 2.0], "tokens/s", "higher")}
    assert compare(one, two) == []
    assert main([folder(tmp_path / "one", one), folder(tmp_path / "two", two)]) == 2
