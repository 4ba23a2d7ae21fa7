"""The benchmark of servers: its parts against a real server, its reports from made-up turns, and the page they make."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import figure
from benchmarks.engine import throughput as engine
from benchmarks.reports import cells, document
from benchmarks.server import loads, throughput as server
from benchmarks.server.loads import Request
from benchmarks.server.systems import TEMPERATURE, Remote
from tests.benchmarks.support import write_json
from tests.conftest import Server
from tests.kernels.support import CONFORMANCE

TINY = str(CONFORMANCE / "tiny")
SYSTEMS = ("server", "one_at_a_time", "upstream", "static", "dense")
ENGINE = (
    f"--model {TINY} --kernels torch --batches 1 2 --contexts 8 16 --context-batch 2 --decoders 2 --prompts 0 1 "
    "--prefill-tokens 8 --steps 2 --repeats 3"
).split()


class Made(Remote):
    """What a turn may bring, without one."""

    def __init__(self, rate: float) -> None:
        super().__init__(0)
        self._rate = rate
        self._draw = random.Random(0)
        self.flags: list[str] = []

    def run(self, load: Sequence[Request], *flags: str) -> dict[str, Any]:
        self.flags = [*flags]
        rate = self._rate * self._draw.gauss(1.0, 0.01)
        waits = dict.fromkeys(("mean_e2el_ms", "p99_ttft_ms", "median_tpot_ms"), 1e5 / rate)
        client = {"cpu_share": 0.25, "bottleneck": ["the client was late"]}
        return {"output_throughput": rate, "request_throughput": rate / 10, "client": client, **waits}


@pytest.fixture
def bench() -> server.Bench:
    chosen = server.parse(["--quick", "--model", TINY])
    return server.Bench(chosen, {name: Made(1000.0 / (1 + number)) for number, name in enumerate(SYSTEMS)})


def test_prompts_have_their_length_and_no_other_seed_has_the_same() -> None:
    one, two = (loads.load([5] * 20, seed) for seed in (1, 2))
    assert {len(request.prompt.encode()) for request in one + two} == {loads.PROMPT}
    assert len({request.prompt[:12] for request in one + two}) == 40
    assert [job.prompt for job in loads.jobs(one)] == [list(request.prompt.encode()) for request in one]


def test_a_server_is_measured_over_http(tiny: Server, tmp_path: Path) -> None:
    load = loads.load([3, 9, 4], seed=0)
    found = Remote(tiny.port)(load, 2)
    assert found["completed"] == 3
    assert found["total_output_tokens"] == 16
    assert found["max_concurrency"] == 2
    with pytest.raises(SystemExit, match=r"bench serve ended with 2.*refused"):
        Remote(1)(load, 2)


def test_what_is_measured_is_judged_and_shown(bench: server.Bench, tmp_path: Path) -> None:
    report: dict[str, Any] = {
        "options": server.options_of(bench.chosen),
        "prompt_tokens": loads.PROMPT,
        "temperature": TEMPERATURE,
        **{name: measurement(bench) for name, measurement in server.MEASUREMENTS.items()},
    }
    against = report["against"]
    assert against["sides"]["engine"]["tokens_per_s"]["value"] > 0  # the real one, with a tiny model
    assert against["ratios"]["to_static"]["value"] == pytest.approx(4, rel=0.1)
    assert against["ratios"]["to_upstream"] | {"goal": "at least 10", "met": False} == against["ratios"]["to_upstream"]
    assert report["heavy_tailed"]["ratios"]["to_static"]["met"]
    assert [point["streams"] for point in report["curve"]["sides"]["server"]] == bench.chosen.concurrency
    assert report["first_token"]["ratios"]["loaded_to_unloaded"]["met"]
    assert bench.server.flags[0] == "--request-rate"  # type: ignore[attr-defined]
    write_json(tmp_path / "server.json", report)
    server.draw(tmp_path, report)
    page = written(tmp_path)
    assert "at least 10: missed" in page
    assert "at least 2: met" in page
    assert cells.shown(against["sides"]["dense"]["tokens_per_s"]) in page
    assert not re.search(r"\s\n", page.replace("\n\n", "\n"))
    assert "The client's own strain, this server: the client was late." in page
    assert "![throughput against latency](results/server-curve.svg)" in page


def written(results: Path) -> str:
    """The page of a folder, which is beside it; what it points at is there."""
    folder = results.parent / "results"
    results.rename(folder)
    document.main(["--results", str(folder), "--out", str(results.parent / "performance.md")])
    page = (results.parent / "performance.md").read_text()
    for target in re.findall(r"\]\(([^)]*)\)", page):
        assert (results.parent / target).is_file(), target
    return page


def test_the_page_tells_what_the_engine_benchmark_wrote(tmp_path: Path) -> None:
    results = tmp_path / "some"
    engine.main([*ENGINE, "--out", str(results)])
    report = json.loads((results / "engine-cpu.json").read_text())
    page = written(results)
    for row in [*report["batches"], *report["contexts"]["by_context"], *report["mixes"]]:
        assert cells.shown(row["figure"]) in page
    assert "## The server over HTTP" not in page


def test_the_page_says_what_run_it_was(tmp_path: Path) -> None:
    results = tmp_path / "some"
    head = {"date": "2026-01-02", "machine": {"cpu": "A CPU", "threads": 2, "system": "Linux"}, "versions": {"x": "1"}}
    parts = {"engine": {"commit": "abc", "seconds": 90.0}, "server": {"commit": "abc", "seconds": 30.0}}
    write_json(results / "suite.json", {**head, "quick": True, "parts": parts})
    page = written(results)
    assert "A CPU, 2 threads, Linux; x 1." in page
    assert "2026-01-02, commit abc, 2 minutes." in page
    assert "its figures say nothing" in page


def test_numbers_have_the_digits_that_count() -> None:
    assert [cells.number(each) for each in (3087.56, 100.4, 19.26, 0.8512, 0)] == [
        "3,088",
        "100",
        "19.3",
        "0.851",
        "0",
    ]
    assert cells.shown(figure([10.0, 10.0, 12.5], "ms", "lower")) == "10 (10 to 12.5)"


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        document.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert "has no results" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
