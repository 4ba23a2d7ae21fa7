"""Servers that are down, slow, wrong or leave: each failure is counted by its kind, and is never a response."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path

import pytest

from bdh_batch.bench.connection import Address, Pool
from bdh_batch.bench.reading import Whole
from bdh_batch.bench.report import Report
from bdh_batch.bench.serve import bench
from bdh_batch.bench.tokens import ByteTokens
from bdh_batch.errors import ConfigError
from tests.bench.fake import DONE, EXPECTED, Fake, event, text
from tests.bench.support import options, prompts
from tests.conftest import free_port


async def run(port: int, file: Path, *flags: object) -> Report:
    fixed = ("--port", port, "--model", "fake", "--tokenizer", "bytes", "--disable-tqdm", "--disable-shuffle")
    return await bench(options(*fixed, "--dataset-name", "custom", "--dataset-path", file, *flags))


@pytest.mark.parametrize("concurrency", [1, 7, None])
async def test_every_failure_is_counted_and_no_response_is_lost(tmp_path: Path, concurrency: int | None) -> None:
    asked = [*EXPECTED, *EXPECTED]
    file = prompts(tmp_path / "p.jsonl", asked)
    flags = [] if concurrency is None else ["--max-concurrency", concurrency]
    async with Fake().listening() as port:
        report = await run(port, file, "--num-prompts", len(asked), *flags)
    found = {asked[one.index]: "" if one.failure is None else one.failure.kind for one in report.measured.outcomes}
    assert found == EXPECTED
    kinds = Counter(kind for kind in EXPECTED.values() if kind)
    assert report.metrics.failures == {kind: 2 * number for kind, number in kinds.items()}
    assert report.metrics.completed == 4
    assert report.metrics.total_output == 12  # as usage reports; nothing of a response that failed
    assert report.metrics.total_input == 28
    assert report.metrics.output_counted_by == {"usage": 4}
    for line in ("http_429:                                2", "http_429: no luck", "error_event: out of luck"):
        assert line in report.table()


async def test_a_server_that_is_down_refuses_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prompts(tmp_path / "p.jsonl", ["a"])
    port = free_port()
    report = await run(port, file, "--num-prompts", 3, "--save-result", "--result-dir", tmp_path, "--save-detailed")
    assert report.metrics.failures == {"connect_refused": 3}
    assert report.metrics.output_throughput == 0.0
    saved = report.saved()
    assert saved["mean_ttft_ms"] is None
    assert saved["errors"][0].startswith("connect_refused: ")
    assert "WARNING: no request was completed." in capsys.readouterr().out
    await run(port, file, "--num-prompts", 1, "--num-warmups", 2)
    assert capsys.readouterr().err == "WARNING: of 2 warm-up requests 2 failed: connect_refused\n"
    with pytest.raises(ConfigError, match=r"--ready-check-timeout-sec 0.2: no good response .* connect_refused"):
        await run(port, file, "--ready-check-timeout-sec", 0.2)
    with pytest.raises(ConfigError, match=r"--model: not given, .* connect_refused"):
        await bench(options("--port", port))
    with pytest.raises(ConfigError, match=r"--base-url http://a\.\.b:1"):
        await run(port, file, "--base-url", "http://a..b:1")


async def test_a_rate_that_cannot_be_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    fake = Fake()
    async with fake.listening() as port:
        with pytest.raises(ConfigError, match="--burstiness 1e-200"):
            await run(port, prompts(tmp_path / "p.jsonl", ["a"]), "--request-rate", 1e-200, "--burstiness", 1e-200)
    assert fake.bodies == []


async def test_a_server_that_is_slow_runs_into_the_timeout(tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.jsonl", ["held"])
    async with Fake().listening() as port:
        report = await run(port, file, "--num-prompts", 3, "--request-timeout-sec", 0.05)
        with pytest.raises(
            ConfigError, match=r"--ready-check-timeout-sec 0.2: no good response .* not complete in time"
        ):
            await run(port, file, "--num-prompts", 1, "--ready-check-timeout-sec", 0.2, "--request-timeout-sec", 1)
    assert report.metrics.failures == {"timeout": 3}


async def test_connections_are_kept_and_one_that_was_closed_meanwhile_is_no_failure(tmp_path: Path) -> None:
    fake = Fake()
    fake.closes = True
    file = prompts(tmp_path / "p.jsonl", ["good", "until it closes"])
    async with fake.listening() as port:
        report = await run(port, file, "--num-prompts", 20, "--max-concurrency", 1)
    assert report.metrics.completed == len(fake.bodies) == 20


@pytest.mark.parametrize(("crossing", "sends"), [(0.0, 1), (math.inf, 2)])
async def test_a_request_that_the_server_may_have_read_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crossing: float, sends: int
) -> None:
    monkeypatch.setattr("bdh_batch.bench.connection.CROSSING_SECONDS", crossing)
    fake = Fake()
    async with fake.listening() as port:
        file = prompts(tmp_path / "p.jsonl", ["held", "held", "held", "hangs up at once"])
        fake.wanted = 3
        report = await run(port, file, "--num-prompts", 4, "--max-concurrency", 3)  # the last on a connection of others
    assert report.metrics.failures == {"closed_before_answer": 1}
    assert len(fake.bodies) == 3 + sends  # never once for each of the three connections that were kept


async def test_latency_counts_from_the_first_send() -> None:
    fake, response = Fake(), Whole()
    async with fake.listening() as port:
        address = Address.of(f"http://127.0.0.1:{port}", insecure=False)
        response.sent = 5.0
        pool = Pool(address)
        await pool.exchange(address.request("GET", "/", {}, b""), response)
        pool.close()
    assert response.sent == 5.0


@pytest.mark.parametrize(
    ("stream", "tokens", "whence", "events"),
    [
        ([text("", token_ids=[]), text("ab", token_ids=[1, 2, 3]), text("c", token_ids=[4])], 4, "token_ids", 2),
        ([text("ab", logprobs={"tokens": ["a", "b"]})], 2, "logprobs", 1),
        ([text("", logprobs=None), text("äb"), text("", finish_reason="stop")], 3, "tokenizer", 2),
        ([text("a"), event(choices=[], usage={"completion_tokens": 9})], 9, "usage", 1),
        (
            [
                event(choices=[{"delta": delta}])
                for delta in ({"role": "assistant", "content": ""}, {"content": "a"}, {})
            ],
            1,
            "tokenizer",
            2,
        ),
        ([event(choices=[{"delta": {"reasoning_content": "hm"}}])], 0, "tokenizer", 1),
    ],
)
async def test_it_is_reported_how_tokens_were_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: list[bytes], tokens: int, whence: str, events: int
) -> None:
    monkeypatch.setattr("tests.bench.fake.STREAMS", {"good": ("", [*stream, DONE])})
    async with Fake().listening() as port:
        report = await run(port, prompts(tmp_path / "p.jsonl", ["good"]), "--num-prompts", 2)
    assert report.metrics.output_counted_by == {whence: 2}
    assert report.metrics.total_output == 2 * tokens
    assert report.metrics.events == 2 * events
    assert report.metrics.input_counted_by == {"bytes": 2}
    assert any("ITL is the time between such events" in note for note in report.notes()) == (tokens != events)


async def test_a_prompt_has_the_tokens_of_what_was_said_before_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bench.fake.STREAMS", {"good": ("", [text("ä"), text("b"), DONE])})
    fake = Fake()
    async with fake.listening() as port:
        fixed = ("--port", port, "--model", "fake", "--tokenizer", "bytes", "--disable-tqdm")
        turns = ("--dataset-name", "multi-turn", "--num-prompts", 3, "--multi-turn-num-turns", 3, "--save-detailed")
        report = await bench(options(*fixed, *turns, "--random-input-len", 10))
    assert report.saved()["input_lens"] == [10, 23, 36] == [len(body["prompt"].encode()) for body in fake.bodies]
    assert report.metrics.input_counted_by == {"bytes": 3}


async def test_an_interrupt_while_texts_are_counted_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(ByteTokens):
        async def count(self, text: str) -> int:
            if text == "answer" and (task := asyncio.current_task()) is not None:
                task.cancel()
                await asyncio.sleep(0)
            return await super().count(text)

    monkeypatch.setattr("bdh_batch.bench.tokens.ByteTokens", Interrupting)
    monkeypatch.setattr("tests.bench.fake.STREAMS", {"good": ("", [text("ans"), text("wer"), DONE])})
    async with Fake().listening() as port:
        report = await run(port, prompts(tmp_path / "p.jsonl", ["good"]), "--num-prompts", 2)
    assert report.measured.interrupted
    assert (report.metrics.completed, report.metrics.total_output) == (2, 4)
    assert report.metrics.output_counted_by == {"events": 2}


@pytest.mark.parametrize("key", ["secret\n", "secr\u00e9t", "a\r\nb: c"])
async def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match=r"^OPENAI_API_KEY: ") as refused:
        await run(1, prompts(tmp_path / "p.jsonl", ["a"]))
    assert key not in str(refused.value)


async def test_what_flags_say_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fake = Fake()
    file = prompts(tmp_path / "p.jsonl", [{"prompt": "a", "output_tokens": 5}, {"prompt": [1, 2], "output_tokens": 6}])
    flags = ["--temperature", 0.5, "--top-k", 3, "--ignore-eos", "--extra-body", '{"user": "me", "top_k": 4}']
    flags += ["--header", "X-More=1", "Host=example.com", "--request-id-prefix", "r-"]
    flags += ["--custom-output-len", "-1", "--num-warmups", 2]
    async with fake.listening() as port:
        report = await run(port, file, "--num-prompts", 2, "--served-model-name", "other", "--logprobs", 2, *flags)
    assert report.metrics.completed == 2
    assert [headers["x-request-id"] for headers in fake.headers] == ["r--1", "r--2", "r-0", "r-1"]
    assert {headers["authorization"] for headers in fake.headers} == {"Bearer secret"}
    assert fake.headers[0]["x-more"] == "1"
    assert fake.heads[0].lower().count("\r\nhost: ") == 1
    assert fake.headers[0]["host"] == "example.com"
    common = {"model": "other", "temperature": 0.5, "top_k": 4, "ignore_eos": True, "user": "me", "logprobs": 2}
    common |= {"stream": True, "stream_options": {"include_usage": True}}
    assert fake.bodies[2:] == [
        {"prompt": "a", "max_tokens": 5, **common},
        {"prompt": [1, 2], "max_tokens": 6, **common},
    ]
    assert "secret" not in str(report.saved())


async def test_latency_counts_from_when_a_request_was_due(tmp_path: Path) -> None:
    """A stalled server holds up the one request at a time: those that wait behind it are late, and it is reported."""
    fake = Fake()
    file = prompts(tmp_path / "p.jsonl", ["slow", *["good"] * 9])
    flags = ["--request-rate", 1000, "--burstiness", "inf", "--max-concurrency", 1, "--save-detailed"]
    async with fake.listening() as port:
        report = await run(port, file, "--num-prompts", 10, *flags)
    outcomes, saved = report.measured.outcomes, report.saved()
    assert saved["due_times"] == pytest.approx([1e-3 * number for number in range(1, 11)])
    assert all(one.due <= one.begun <= one.sent < one.first for one in outcomes)
    assert saved["queue_times"][1] == pytest.approx(outcomes[1].begun - outcomes[1].due)
    assert outcomes[1].begun >= outcomes[0].ended > outcomes[9].due
    assert saved["mean_ttft_ms"] > saved["mean_ttft_from_send_ms"]
    assert saved["loop"] == "open"
    assert fake.most == 1


async def test_a_closed_loop_sends_when_a_slot_is_free(tmp_path: Path) -> None:
    fake = Fake()
    fake.wanted = 5
    file = prompts(tmp_path / "p.jsonl", ["held"])
    async with fake.listening() as port:
        report = await run(port, file, "--num-prompts", 60, "--max-concurrency", 5)
    assert fake.most == 5
    assert report.metrics.max_concurrent_requests <= 5
    assert report.saved()["loop"] == "closed"
    first = sorted(report.measured.outcomes, key=lambda one: one.due)
    ends = sorted(one.ended for one in first)
    assert all(one.due >= end for one, end in zip(first[5:], ends))
