"""The soak: it passes a server that fails as servers may, and sees what no server may do."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bdh_batch.errors import OutOfMemory
from bdh_batch.messages import Outcome, Plan, SamplingParams, Segment
from benchmarks.stress import soak
from benchmarks.stress.clients import KINDS, Target, asks_little, meet
from benchmarks.stress.crowd import MOST_FAULTS, Soak
from benchmarks.stress.faulty import ODDS, FaultyRunner

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
DELTA, DONE = b'data: {"choices":[{"index":0,"finish_reason":"length"}]}\n\n', b"data: [DONE]\n\n"
REFUSAL = b'{"error":{"message":"Full.","code":"queue_full"}}'
FAILED = b'data: {"error":{"message":"It failed.","code":null}}\n\n'


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, *([b""] if end else [])))


@asynccontextmanager
async def answering(raw: bytes) -> AsyncIterator[Target]:
    """A server that answers every request with the same bytes, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(raw)
        await writer.drain()
        writer.write_eof()
        with suppress(ConnectionResetError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Target(*server.sockets[0].getsockname())


def test_passes_a_server_whose_steps_fail_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--model {TINY} --faults 8 --seconds 3 --warm-up 1 --clients 16 --growth 0.5 --out {tmp_path}".split()
    code = soak.main(arguments)
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["faults"] == []
    assert code == 0
    assert report["places"] == 1
    assert report["after"]["Mailbox"] <= report["before"]["Mailbox"] <= 1
    assert sum(report["after"]["made"].values()) > sum(report["before"]["made"].values())
    assert report["requests"] == sum(sum(ends.values()) for ends in report["ends"].values()) > 16
    assert '"faults": []' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raw", "end"),
    [
        (chunked(DELTA, DONE), "done"),
        (chunked(DELTA + DONE), "done"),
        (chunked(DELTA, FAILED), "event It failed."),
        (chunked(DELTA), "no end"),
        (chunked(DONE), "incomplete"),
        (chunked(DELTA, DELTA, DONE), "incomplete"),
        (chunked(DELTA.replace(b"length", b"abort"), DONE), "incomplete"),
        (chunked(DELTA, DONE, end=False), "cut"),
        (chunked(DELTA)[:-20], "cut"),
        (HEAD, "cut"),
        (b"", "cut"),
        (b"nothing of HTTP\r\n\r\n", "cut"),
        (b"HTTP/1.1 429 No\r\ncontent-length: %d\r\n\r\n%b" % (len(REFUSAL), REFUSAL), "429 queue_full"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nNo", "500 that is no error body: b'No'"),
    ],
)
async def test_every_end_is_told_from_the_others(raw: bytes, end: str) -> None:
    async with answering(raw) as target:
        assert await meet(asks_little, target, random.Random(1)) == end


async def test_a_server_that_cuts_its_streams_fails() -> None:
    async with answering(chunked(DELTA, end=False)) as target:
        crowd = Soak(target, 8, 1, injected=True, disconnects=None)
        await crowd.run(60)
    assert crowd.faults["stays: cut"] > 10
    assert crowd.faults["talks nonsense: 200, not 400"] > 1
    assert crowd.faults.total() >= MOST_FAULTS
    assert crowd.ends["leaves before the answer"].keys() == {"left"}


SOUND: dict[str, Any] = {
    "unexpected": {},
    "disconnects_wanted": 10,
    "disconnects": 10,
    "places": 1.0,
    "quarters": {"rss": [1e8, 1e8, 1e8, 1.01e8]},
    **{
        when: {"running": 0, "waiting": 0, "suspended": 0, "http_requests": 0, "health": "ok"}
        | {"threads": 4, "files": 14, "tasks": 4, "live": dict.fromkeys(soak.OURS, 1)}
        for when in ("before", "after")
    },
}


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("unexpected", "stays: cut"), 3, "3 times stays: cut"),
        (("disconnects",), 9, "9 clients left, not 10"),
        (("places",), 15 / 16, "of the slots only 94% can be used"),
        (
            ("quarters", "rss"),
            [1e8, 1e8, 1.02e8, 1.03e8],
            "memory grows: 95.4 MiB in the second quarter, 98.2 in the last",
        ),
        (("after", "running"), 1, "at rest 1 running"),
        (("after", "http_requests"), 2, "at rest 2 http_requests"),
        (("after", "health"), "the engine is down", "health: the engine is down"),
        (("after", "threads"), 5, "5 threads at rest, 4 before"),
        (("after", "files"), 15, "15 files at rest, 14 before"),
        (("after", "live", soak.OURS[0]), 2, f"2 {soak.OURS[0]} live at rest, 1 before"),
    ],
)
def test_every_leak_is_reported(path: tuple[str, ...], value: object, fault: str) -> None:
    assert soak.faults_of(SOUND, growth=0.02) == []
    report = copy.deepcopy(SOUND)
    part = report
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    assert soak.faults_of(report, growth=0.02) == [fault]


class Computes:
    def run(self, plan: Plan) -> Outcome:
        return Outcome([7] * len(plan.segments))


def test_a_faulty_runner_makes_every_fault_and_repeats_itself() -> None:
    plan = Plan([Segment(slot, 0, range(9), SamplingParams()) for slot in range(3)])

    def outcomes() -> list[str]:
        runner = FaultyRunner(Computes(), seed=1, often=20, dawdle=0.001)
        found = []
        for _ in range(300):
            try:
                found.append(str(runner.run(plan).drawn))
            except (RuntimeError, OutOfMemory) as error:
                found.append(repr(error))
        assert runner.made.keys() == ODDS.keys()
        return found

    first = outcomes()
    assert set(first) >= {"[7, 7, 7]", "[None, 7, 7]", "RuntimeError('injected')", "OutOfMemory('injected')"}
    assert outcomes() == first


def test_most_kinds_of_a_crowd_that_leaves_do() -> None:
    assert sum(kind.disconnects for kind in KINDS.values() if "left" in kind.ends) > 0.9 * sum(
        kind.disconnects for kind in KINDS.values()
    )
