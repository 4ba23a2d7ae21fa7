"""`bench serve` against real servers: what it says is what the server says, and what the wire says."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bdh_batch.bench.serve import bench
from tests.bench.support import options, prompts
from tests.conftest import ROOT, Cli, Server, clean_environment, command

VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate"),
    *("burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests"),
    *(f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99") for metric in ("ttft", "tpot", "itl", "e2el")),
}
SHORT = (
    "--prefix-repetition-num-prefixes",
    2,
    "--prefix-repetition-prefix-len",
    40,
    "--prefix-repetition-suffix-len",
    9,
)
VLLM_DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors"}
TALK = [
    {"conversations": [{"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": f"Answer {n}."}] * 3}
    for n in range(4)
]


async def test_every_kind_of_data_over_both_apis_agrees_with_the_server(tiny: Server, tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps(TALK))
    lines = prompts(tmp_path / "lines.jsonl", ["one", "two", "drei äöü"])
    lengths = ("--random-input-len", 30, "--random-output-len", 8, "--num-prompts", 12, "--disable-tqdm")
    for flags in (
        ("--random-range-ratio", 0.5, "--random-prefix-len", 20),
        ("--dataset-name", "prefix_repetition", "--output-len", 6, *SHORT),
        ("--dataset-name", "sharegpt", "--dataset-path", talk, "--max-concurrency", 3),
        ("--dataset-name", "custom", "--dataset-path", lines, "--output-len", 7, "--request-rate", 400),
        ("--dataset-name", "multi-turn", "--dataset-path", talk, "--ignore-eos"),
        ("--dataset-name", "multi-turn", "--multi-turn-think-time-sec", 0.001, "--max-concurrency", 2),
        ("--ramp-up-strategy", "exponential", "--ramp-up-start-rps", 100, "--ramp-up-end-rps", 800),
    ):
        for backend in ("openai", "openai-chat"):
            before = tiny.metrics()["bdh_generation_tokens_total"]
            report = await bench(options("--base-url", tiny.url, "--backend", backend, *lengths, *flags))
            metrics = report.metrics
            assert metrics.completed == 12, report.table()
            assert metrics.failed == 0
            total = before + metrics.total_output
            tiny.until(lambda m, total=total: m["bdh_generation_tokens_total"] == total)  # type: ignore[misc]
            assert metrics.input_counted_by == metrics.output_counted_by == {"usage": 12}
            if backend == "openai" and "multi-turn" not in flags:  # no template, no history: the data's own count
                assert [one.prompt_tokens for one in report.measured.outcomes] == [
                    len(one.encode()) for one in await _sent(report.options)
                ]


async def _sent(asked: Any) -> list[str]:
    from bdh_batch.bench.data import conversations
    from bdh_batch.bench.texts import Writer
    from bdh_batch.bench.tokens import ByteTokens

    return [str(turn.content) for (turn,) in await conversations(asked, await Writer.with_tokens(ByteTokens()))]


async def test_a_turn_contains_what_was_said_before(tiny: Server) -> None:
    flags = ("--dataset-name", "multi-turn", "--num-prompts", 6, "--multi-turn-num-turns", 3, "--save-detailed")
    report = await bench(
        options("--base-url", tiny.url, *flags, "--random-input-len", 9, "--random-output-len", 5, "--disable-tqdm")
    )
    reported = report.saved()
    responses = [len(text.encode()) for text in reported["generated_texts"]]
    assert reported["input_lens"][0] == reported["input_lens"][3] == 9
    for turn in (1, 2, 4, 5):
        assert reported["input_lens"][turn] == reported["input_lens"][turn - 1] + responses[turn - 1] + 9
        assert reported["due_times"][turn] > reported["due_times"][turn - 1] + reported["latencies"][turn - 1] - 1e-6


def test_the_command_prints_and_saves_what_vllm_does(tiny: Server, tmp_path: Path, cli: Cli) -> None:
    fixed = ["bench", "serve", "--base-url", tiny.url, "--num-prompts", 8, "--input-len", 20, "--output-len", 6]
    saving = ["--save-result", "--append-result", "--result-dir", tmp_path / "new", "--metadata", "version=1", "tp=2"]
    done = cli(*fixed, *saving, "--label", "mine", "--goodput", "ttft:60000", "e2el:60000", "--request-rate", 200)
    assert done.returncode == 0, done.stderr
    assert "8/8 requests, 0 failed, 0 under way" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     8" in lines
    assert "Request rate configured (RPS):           200.00" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    (file,) = (tmp_path / "new").iterdir()
    assert file.name.startswith("mine-200.0qps-")
    saved = json.loads(file.read_text())
    assert saved.keys() >= VLLM_KEYS | {"version", "tp"}
    assert not saved.keys() & VLLM_DETAILS
    assert saved["request_goodput"] == saved["request_throughput"] == saved["completed"] / saved["duration"]
    assert saved["total_input_tokens"] == 160
    assert saved["total_token_throughput"] == pytest.approx(208 / saved["duration"])

    named = ["--append-result", "--result-filename", file, "--save-detailed", "--percentile-metrics", "ttft"]
    done = cli(*fixed, *named, "--metric-percentiles", "25,99.9", "--disable-tqdm", "--num-warmups", 2, "--seed", 1)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == saved
    assert second.keys() >= VLLM_DETAILS | {"p25_ttft_ms", "p99.9_ttft_ms"}
    assert "mean_itl_ms" not in second
    assert second["output_lens"] == [6] * 8
    assert all(len(gaps) < 6 for gaps in second["itls"])
    assert cli(*fixed, "--base-url", "http://127.0.0.1:9", "--model", "a", "--tokenizer", "bytes").returncode == 1


def test_ctrl_c_ends_with_what_there_is(tiny: Server, tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.jsonl", [{"prompt": "a", "output_tokens": n} for n in (3, 100_000, 2, 2, 2)])
    flags = ["--dataset-name", "custom", "--dataset-path", file, "--custom-output-len", -1, "--disable-shuffle"]
    flags += ["--num-prompts", 5, "--max-concurrency", 1, "--ignore-eos", "--no-oversample", "--save-result"]
    before = tiny.metrics()["bdh_generation_tokens_total"]
    running = subprocess.Popen(
        command("bench", "serve", "--base-url", tiny.url, *flags, "--result-filename", tmp_path / "r.json"),
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    tiny.until(lambda m: m["bdh_generation_tokens_total"] > before + 3 and m["bdh_num_requests_running"] == 1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert "the run was interrupted; 4 requests are missing." in out
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["completed"], saved["failed"], saved["unfinished"]) == (1, 0, 4)
    assert saved["total_output_tokens"] == 3
    tiny.until_idle()


class Wire:
    """A relay of bytes, which notes with a thread for each direction when what was read: a second clock on the same
    events, that knows of no event loop and no parser."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.asked: dict[str, float] = {}  # by request id: when the request was read
        self.reported: dict[str, list[float]] = {}  # when each piece with a token of its response was
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    @contextmanager
    def open(self) -> Iterator[Wire]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._to))
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            asked: list[str] = []  # ids, in the order of the connection
            threading.Thread(target=self._up, args=(client, server, asked), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client, asked), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket, asked: list[str]) -> None:
        with contextlib.suppress(OSError):  # the other side has gone
            while data := client.recv(1 << 20):
                now = time.perf_counter()
                if b"x-request-id: " in data:
                    asked.append(data.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode())
                    self.asked[asked[-1]] = now
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _down(self, server: socket.socket, client: socket.socket, asked: list[str]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                now = time.perf_counter()
                if tokens := len(re.findall(rb'"token_ids":\[\d', data)):
                    self.reported.setdefault(asked[-1], []).extend([now] * tokens)
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
        server.close()
        client.close()


@dataclass(frozen=True)
class Seen:
    """What a wire saw, in milliseconds."""

    first: list[float]
    whole: list[float]
    gaps: list[float]
    duration: float

    @classmethod
    def on(cls, wire: Wire) -> Seen:
        times = [(wire.asked[request], *wire.reported[request]) for request in sorted(wire.asked)]
        assert {len(of) for of in times} == {31}
        return cls(
            first=[1e3 * (of[1] - of[0]) for of in times],
            whole=[1e3 * (of[-1] - of[0]) for of in times],
            gaps=[1e3 * (later - earlier) for of in times for earlier, later in pairwise(of[1:])],
            duration=1e3 * (max(of[-1] for of in times) - min(of[0] for of in times)),
        )

    def figures(self) -> dict[str, float]:
        """By their names in a result file."""
        return {
            "median_ttft_from_send_ms": statistics.median(self.first),
            "mean_ttft_from_send_ms": statistics.mean(self.first),
            "median_e2el_from_send_ms": statistics.median(self.whole),
            "mean_e2el_ms": statistics.mean(self.whole),
            "mean_tpot_ms": statistics.mean(self.gaps),
            "mean_itl_ms": statistics.mean(self.gaps),
            "output_throughput": 1e3 * 270 / self.duration,
        }

    def noise(self, other: Seen) -> float:
        """What passing on a piece may take on this machine now: the largest difference to another wire in the row."""
        return max(
            abs(one - two)
            for mine, others in ((self.first, other.first), (self.whole, other.whole), (self.gaps, other.gaps))
            for one, two in zip(mine, others, strict=True)
        )


def test_it_agrees_with_timestamps_of_the_sockets_within_two_percent(server: Server, tmp_path: Path, cli: Cli) -> None:
    """Beside the noise of the machine, which a second wire behind the first one shows. It shows none of what held up
    the client alone, so that once out of several times is enough."""
    wrong: list[list[str]] = []
    for number in range(10):
        wrong.append(disagreements(server, tmp_path / f"{number}.json", cli))
        if not wrong[-1]:
            return
    raise AssertionError(wrong)


def disagreements(server: Server, file: Path, cli: Cli) -> list[str]:
    """The figures in which they disagree."""
    with Wire(server.port).open() as far, Wire(far.port).open() as wire:
        flags = ["--num-prompts", 9, "--input-len", 300, "--output-len", 30, "--max-concurrency", 3]
        more = ["--extra-body", '{"return_token_ids": true}', "--request-id-prefix", "r", "--save-detailed"]
        done = cli("bench", "serve", "--port", wire.port, *flags, *more, "--save-result", "--result-filename", file)
    assert done.returncode == 0, done.stderr
    reported = json.loads(file.read_text())
    assert reported["output_lens"] == [30] * 9
    assert sorted(wire.reported) == sorted(wire.asked) == sorted(f"r{n}" for n in range(9))
    seen = Seen.on(wire)
    noise = seen.noise(Seen.on(far))
    expected = {
        name: pytest.approx(value, rel=0.02 + 3 * noise / seen.duration)
        if name == "output_throughput"
        else pytest.approx(value, rel=0.02, abs=3 * noise)
        for name, value in seen.figures().items()
    }
    return [f"{name}: {reported[name]}, not {value}" for name, value in expected.items() if reported[name] != value]
