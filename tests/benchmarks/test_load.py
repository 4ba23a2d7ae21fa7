"""The load by locust, which runs in processes of its own: it patches what it is imported into."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.stress import load
from tests.bench.fake import EXPECTED, SSE, Fake, text

if TYPE_CHECKING:
    from tests.conftest import Server

ROOT = Path(__file__).parents[2]
MIB = 2**20
MORE_THAN_IS_READ = 1000  # tokens, which only those who leave ask for


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def by_type(file: Path) -> dict[str, Counter[str]]:
    """How many there are of each name, by type."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows(file):
        found[row["Type"]][row["Name"]] = int(row["Request Count"])
    return found


def test_a_load_leaves_its_report_and_its_verdicts(tiny: Server, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.stress.load",
        "--url",
        tiny.url,
        "--pid",
        tiny.process.pid,
        "--out",
        tmp_path,
    ]
    command += ["--seconds", 6, "--climbs", 1, "--users", 2, "--think", 0.02, "--answer-tokens", 8, "--tags", "steady"]
    ended = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    report = json.loads((tmp_path / "load.json").read_text())
    assert ended.returncode == int(False in report["verdicts"].values()), ended.stderr
    assert report["failures"] == {}
    assert report["verdicts"]["no_failures"]
    assert [stage["users"] for stage in report["stages"]] == [1, 2]
    assert all(stage["rss_median"] > 50 * MIB for stage in report["stages"])
    found = by_type(tmp_path / "load_stats.csv")
    completions = found["answer"]
    assert report["answers"] == completions.total() > 0
    assert found[""] == {"Aggregated": completions.total()}  # first tokens and gaps are no requests
    assert completions.keys() <= {"completion", "chat"}
    assert found["ttft"] == completions
    assert found["gap"].total() > completions.total()
    page = (tmp_path / "load.html").read_text()
    assert all(name in page for name in ("ttft", "gap", "tokens/s"))


class Cycle(Fake):
    """Answers in every way in turn, whatever is asked; those who mean to leave it answers without an end."""

    def __init__(self) -> None:
        super().__init__()
        self.answered: Counter[str] = Counter()
        self._requests = itertools.cycle(EXPECTED)

    async def _answer(self, prompt: str, writer: asyncio.StreamWriter) -> None:
        if self.bodies[-1].get("max_tokens") == MORE_THAN_IS_READ:
            self.answered["left"] += 1
            await self._for_ever(writer)
        request = next(self._requests)
        self.answered[EXPECTED[request]] += 1  # before: a client that has seen an error need not stay for the rest
        await super()._answer(request, writer)

    async def _for_ever(self, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        piece = text("a")
        while True:  # until writing fails, as the client is gone
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            await asyncio.sleep(0.001)


SCENARIOS = {"completion", "chat", "burst", "long prompt", "key 1", "key 2"}


async def test_whatever_is_wrong_with_a_response_is_a_failure_of_its_kind(tmp_path: Path) -> None:
    """In all scenarios, each of which is met: where the machine is slow, that takes longer."""
    for seconds in (3, 15, 60):
        fake, folder = Cycle(), tmp_path / str(seconds)
        folder.mkdir()
        await crowd(fake, folder, seconds)
        counted = by_type(folder / "load_stats.csv")
        if fake.answered.keys() == {*EXPECTED.values(), "left"} and counted["answer"].keys() == SCENARIOS:
            break
    else:
        raise AssertionError((fake.answered, counted))
    found = json.loads((folder / "seen.json").read_text())
    others = {"": found["answers"], "http_429": found["refused"], "left": found["left"]}
    assert Counter(found["failures"]) + Counter(others) == fake.answered
    failures: Counter[str] = Counter()
    for row in rows(folder / "load_failures.csv"):
        failures[row["Error"].removeprefix("CatchResponseError('").removesuffix("')")] += int(row["Occurrences"])
    assert failures == found["failures"]
    assert counted["left"] == {"leaving": found["left"]}
    assert counted["429"].total() == found["refused"]
    assert counted[""].total() == counted["answer"].total() == found["answers"] + failures.total()
    assert {headers["authorization"] for headers in fake.headers} == {"Bearer a", "Bearer b"}
    assert max(len(body.get("prompt", "")) for body in fake.bodies) == 4096


async def crowd(fake: Cycle, folder: Path, seconds: int) -> None:
    """Has locust's users ask for so many seconds; what they saw is in the folder."""
    async with fake.listening() as port:
        command = ["-m", "locust", "-f", "benchmarks/stress/locustfile.py", "--headless", "-H"]
        command += [f"http://127.0.0.1:{port}", "-u", "30", "-r", "100", "-t", f"{seconds}s", "--stop-timeout", "60"]
        command += ["--think", "0.01", "--api-keys", "a,b", "--csv", str(folder / "load")]
        command += ["--samples", str(folder / "seen.json"), "-L", "WARNING", "--only-summary"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=ROOT, stderr=asyncio.subprocess.DEVNULL
        )
        assert await process.wait() == 1  # as for any failure


USERS = [2, 16, 64, 128, 128, 64, 16, 2]


def seen(rates: Sequence[float], memory: Sequence[int], users: Sequence[int] = USERS, **more: Any) -> dict[str, Any]:
    """Ten seconds a stage, a sample a second; users come and go within three."""
    samples, tokens = [], 0.0
    for second in range(10 * len(rates) + 1):
        stage = min(second // 10, len(rates) - 1)
        counts = {"tokens": tokens / 4, "prompt_tokens": tokens * 3 / 4, "answers": tokens / 10, "refused": 0}
        there = users[stage] if second % 10 >= 3 or second == 0 else 77
        samples.append({"seconds": second, "users": there, "rss": memory[stage] * MIB or None, **counts})
        samples[-1]["client_cpu_seconds"] = second / 4
        tokens += rates[stage]
    return {"answers": 9, "refused": 0, "left": 1, "stopped": 2, "failures": {}, "samples": samples, **more}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (seen([40, 96, 99, 97, 98, 97, 96, 41], [90, 95, 95, 96, 96, 96, 96, 96]), (True, True, True)),
        (seen([40, 96, 99, 85, 85, 97, 96, 41], [99] * 8), (True, False, True)),
        (seen([40, 96, 85, 97, 98, 85, 96, 41], [99] * 8), (True, False, True)),  # in the middle alone
        (seen([40, 96, 99, 97, 72, 71, 72, 41], [99] * 8), (True, True, True)),  # the machine's doing
        (seen([40, 96, 99, 97, 98, 70, 96, 41], [99] * 8), (True, False, True)),  # on the way down alone
        (seen([40, 96, 99, 97, 20, 20, 20, 20], [99] * 8), (True, False, True)),  # does not recover
        (seen([40, 96, 99, 97, 98, 97, 30, 30], [99] * 8), (True, False, True)),  # breaks down late
        (seen([40, 96, 99, 97, 0, 0, 0, 0], [99] * 4 + [0] * 4, failures={"timeout": 9}), (False, False, None)),  # dies
        (seen([40, 96, 99, 97, 98, 97, 96, 41], [50, 80, 99, 99, 110, 120, 120, 120]), (True, True, False)),
        (seen([10, 20, 40, 80, 80, 40, 20, 10], [99] * 8), (True, None, None)),  # more users would bring more
        (seen([99] * 8, [99] * 8, failures={"closed_mid_stream": 1}), (False, True, True)),
        (seen([0] * 8, [99] * 8, failures={"connect_refused": 9}), (False, None, None)),
    ],
)
def test_what_becomes_of_a_server_past_its_saturation_is_judged(
    what: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    report = load.judged(what, load.stages_of(128, 80, climbs=2))
    assert [stage["users"] for stage in report["stages"]] == [2, 16, 64, 128, 128, 64, 16, 2]
    found = report["verdicts"]
    assert (found["no_failures"], found["throughput_flat"], found["memory_flat"]) == expected
    assert report["stages"][0]["client_cpu_share"] == 0.25


def test_the_figures_of_a_stage_are_those_after_it_has_settled() -> None:
    figures = load.judged(seen([40, 80], [90, 95], [1, 2]), load.stages_of(2, 20, climbs=1))["stages"]
    assert [stage["tokens_per_s"] for stage in figures] == [10, 20]
    assert [stage["prompt_tokens_per_s"] for stage in figures] == [30, 60]
    with pytest.raises(RuntimeError, match="more --seconds"):
        load.judged(seen([40, 80], [90, 95], [1, 2]), [(1, 0, 1), (2, 1, 20)])
    with pytest.raises(RuntimeError, match="ended after 20 s, before its last stage"):
        load.judged(seen([40, 80], [90, 95], [1, 2]), load.stages_of(2, 60, climbs=1))
