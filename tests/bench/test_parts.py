"""Arrivals, percentiles, the cutting of streams, texts of a wanted length: what needs no server."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from bdh_batch.bench.arrivals import Ramp, offsets
from bdh_batch.bench.data import Conversation, conversations
from bdh_batch.bench.figures import Figures
from bdh_batch.bench.metrics import is_good, peak_concurrency, peak_rate
from bdh_batch.bench.outcome import Failed, Outcome
from bdh_batch.bench.progress import Progress, Tally
from bdh_batch.bench.sse import Events
from bdh_batch.bench.strain import Strain, Watch, swallowed
from bdh_batch.bench.texts import Writer
from bdh_batch.bench.tokens import ByteTokens, FileTokens, GuessedTokens, Tokens
from bdh_batch.cli import main
from bdh_batch.errors import ConfigError
from tests.bench.support import options, prompts
from tests.text.tokenizers import byte_level

RATES = st.floats(1e-3, 1e5)


@given(count=st.integers(1, 200), rate=RATES, burstiness=st.floats(0.05, 1e3) | st.just(math.inf), seed=st.integers())
def test_arrivals_come_in_order_at_the_rate_that_was_asked_for(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    found = offsets(count, rate, burstiness, seed)
    assert len(found) == count
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] == pytest.approx(count / rate)
    assert found == offsets(count, rate, burstiness, seed)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float) -> None:
    gaps = np.diff(offsets(20_000, 50.0, burstiness, 1))
    assert gaps.mean() == pytest.approx(1 / 50, rel=1e-3)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)
    if burstiness == 1.0:  # a Poisson process: an exponential distribution, whose median is ln 2 of its mean
        assert np.median(gaps) == pytest.approx(math.log(2) / 50, rel=0.03)


@given(
    count=st.integers(2, 100),
    start=RATES,
    factor=st.floats(1, 100),
    strategy=st.sampled_from(["linear", "exponential"]),
)
def test_a_ramp_goes_from_its_first_rate_to_its_last(count: int, start: float, factor: float, strategy: str) -> None:
    found = offsets(count, Ramp(strategy, start, start * factor), math.inf, 0)
    rates = [1 / gap for gap in np.diff([0.0, *found])]
    assert rates[0] == pytest.approx(start, rel=1e-6)
    assert rates[-1] == pytest.approx(start * factor, rel=1e-3)
    middle = Ramp(strategy, start, start * factor).rate(0.5)
    assert middle == pytest.approx(start * (1 + factor) / 2 if strategy == "linear" else start * math.sqrt(factor))


def test_all_at_once_and_never() -> None:
    assert offsets(3, math.inf, 1.0, 0) == [0.0] * 3
    for rate, burstiness, flag in (
        (1.0, 1e-300, "--burstiness 1e-300"),
        (10.0, 1e308, "--burstiness"),
        (1e-200, 1e-200, "--burstiness"),
        (1e-320, 1.0, "--request-rate"),
        (1e-320, math.inf, "--request-rate"),
        (0.0, 1.0, "--request-rate"),  # a quarter of the least float, where conversations have four turns
        (Ramp("linear", 1e-320, 1.0), 1.0, "--ramp-up-start-rps"),
        (Ramp("exponential", 1e-200, 1.0), 1e-200, "--burstiness"),
    ):
        with pytest.raises(ConfigError, match=flag):
            offsets(3, rate, burstiness, 0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.lists(st.floats(0, 100), max_size=5))
def test_figures_are_numpys(values: list[float], percents: list[float]) -> None:
    found = Figures.of(values, percents)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert found.median == pytest.approx(np.median(values), rel=1e-9, abs=1e-6)
    assert found.std == pytest.approx(np.std(values), rel=1e-9, abs=1e-6)
    for percent, value in found.percentiles:
        assert value == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_of_nothing_there_is_nothing_to_say() -> None:
    assert Figures.of([], [99.0]) is None
    assert peak_rate([]) == peak_concurrency([]) == 0


def completed(due: float, sent: float, times: list[float], tokens: int) -> Outcome:
    return Outcome(
        0, due, 1, begun=sent, sent=sent, times=times, ended=times[-1], reported_tokens=tokens, complete=True
    )


def test_goodput_and_peaks() -> None:
    one = completed(0.0, 0.5, [1.0, 1.1, 1.3], 4)
    assert one.per_token == pytest.approx(0.1)
    assert one.gaps == pytest.approx([0.1, 0.2])
    limits = {"ttft": 1000.0, "tpot": 101.0, "e2el": 1301.0}
    assert is_good(one, limits)
    assert not any(is_good(one, limits | {name: limit - 2}) for name, limit in limits.items())
    assert is_good(completed(0.0, 0.0, [0.5], 1), {"tpot": 0.0})
    other = completed(1.3, 1.3, [1.6, 2.6], 10)
    assert peak_concurrency([one, other]) == 1
    assert peak_concurrency([one, one, other]) == 2
    assert peak_rate([one, other]) == pytest.approx(5.0)
    assert peak_rate([other, completed(1.3, 1.3, [1.4], 1)]) == pytest.approx(6.0)


def test_a_client_that_is_the_bottleneck_says_so() -> None:
    assert Strain(0.3, 0.0, 0.002, 0.002).signs() == []
    assert len(Strain(0.95, 0.01, 0.05, 0.05).signs()) == 3


async def test_a_stall_weighs_as_much_as_it_lasts() -> None:
    assert swallowed(0.0) == [0.0]
    assert swallowed(0.012) == pytest.approx([0.012, 0.007, 0.002])
    async with Watch() as watch:
        await asyncio.sleep(0.3)
        time.sleep(0.1)  # noqa: ASYNC251 - the stall; one tick of some sixty
        await asyncio.sleep(0.3)
    assert watch.strain(()).loop_late_p99 > 0.08
    async with Watch() as watch:
        time.sleep(0.1)  # noqa: ASYNC251 - until the end, such that no tick comes at all
    assert watch.strain(()).loop_late_median > 0.03


async def test_progress_is_one_line_on_a_terminal_and_lines_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, shape in ((Terminal(), "\r{}\x1b[K\n"), (io.StringIO(), "{}\n")):
        tally = Tally(9)
        async with Progress(tally, out, silent=False):
            tally.completed, tally.failed, tally.running = 3, 2, 1
        said = re.sub(r"\d+ s\b", "N s", out.getvalue())
        assert said == shape.format("5/9 requests, 2 failed, 1 under way, 0 tokens/s, N s")


@given(st.data())
def test_events_are_the_same_however_a_stream_is_cut(data: st.DataObject) -> None:
    bodies = data.draw(st.lists(st.text('ab {}[]:"\\é', min_size=1), max_size=5))
    ends = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    stream = b"".join(b": x\nid: 7\ndata: " + body.encode() + b"\n\n" for body in bodies).replace(b"\n", ends)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    events = Events()
    found = [event for begin, end in zip([0, *cuts], [*cuts, len(stream)]) for event in events.feed(stream[begin:end])]
    assert found == [(b"", body.encode()) for body in bodies]
    assert not events.unfinished


def test_lines_of_an_event_are_joined_and_other_lines_are_refused() -> None:
    stream = b"event: a\ndata: 1\ndata:2\nretry: 3\n\n\n\nevent: b\n\ndata: 3\n\n"
    assert list(Events().feed(stream)) == [(b"a", b"1\n2"), (b"", b"3")]
    for line in (b"data", b"x: 1", b"<html>"):
        with pytest.raises(Failed) as failed:
            list(Events().feed(line + b"\n"))
        assert failed.value.kind == "malformed_sse"


@settings(max_examples=30)
@given(length=st.integers(0, 400), seed=st.integers())
async def test_texts_have_as_many_tokens_as_are_wanted(length: int, seed: int, bpe: FileTokens) -> None:
    for tokens in (ByteTokens(), bpe, GuessedTokens()):
        writer = await Writer.with_tokens(tokens)
        text, count = await writer.text(Random(seed), length)
        assert count == await tokens.count(text) == length
        assert (text, count) == await writer.text(Random(seed), length)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> FileTokens:
    folder = tmp_path_factory.mktemp("bpe")
    byte_level().save(str(folder / "tokenizer.json"))
    return FileTokens(folder)


async def made(*flags: object, tokens: Tokens | None = None) -> list[Conversation]:
    return await conversations(options(*flags), await Writer.with_tokens(tokens or ByteTokens()))


SHAREGPT = [
    {"conversations": [{"from": "human", "value": "question " * n}, {"from": "gpt", "value": "answer " * n}] * turns}
    for n, turns in ((1, 1), (2, 3), (3, 2), (200, 1))
] + [{"conversations": [{"from": "human", "value": "alone"}]}, {}]


async def test_the_same_seed_gives_the_same_data(tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps(SHAREGPT))
    lines = prompts(tmp_path / "lines.jsonl", [f"prompt {n}" for n in range(9)])
    random = ["--dataset-name", "random", "--random-input-len", 50, "--random-range-ratio", 0.5]
    for flags in (
        random,
        ["--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", 3],
        ["--dataset-name", "sharegpt", "--dataset-path", talk],
        ["--dataset-name", "custom", "--dataset-path", lines],
        ["--dataset-name", "multi-turn", "--random-input-len", 20],
        ["--dataset-name", "multi-turn", "--dataset-path", talk],
    ):
        first = await made(*flags, "--num-prompts", 10)
        assert first == await made(*flags, "--num-prompts", 10)
        assert first != await made(*flags, "--num-prompts", 10, "--seed", 1)
        assert sum(map(len, first)) == 10


async def test_data_is_what_its_flags_say(tmp_path: Path) -> None:
    flags = ["--random-input-len", 40, "--random-output-len", 10, "--random-range-ratio", 0.5, "--random-prefix-len", 7]
    turns = [turn for (turn,) in await made("--num-prompts", 300, *flags)]
    assert {len(str(turn.content)) - turn.tokens for turn in turns} == {0}
    assert (min(t.tokens for t in turns), max(t.tokens for t in turns)) == (27, 67)
    assert {turn.output_tokens for turn in turns} == set(range(5, 16))
    assert len({str(turn.content)[:7] for turn in turns}) == 1
    assert len({turn.content for turn in turns}) == 300

    shared = [turn for (turn,) in await made("--dataset-name", "prefix_repetition", "--num-prompts", 25)]
    assert len({str(turn.content)[:256] for turn in shared}) == 10
    assert {turn.tokens for turn in shared} == {512}

    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps(SHAREGPT))
    taken = await made("--dataset-name", "sharegpt", "--dataset-path", talk, "--no-oversample")
    assert sorted((turn.tokens, turn.output_tokens) for (turn,) in taken) == [(9, 7), (18, 14), (27, 21)]
    several = await made("--dataset-name", "multi-turn", "--dataset-path", talk, "--no-oversample", "--output-len", 5)
    assert sorted(map(len, several)) == [1, 1, 2, 3]
    assert {turn.output_tokens for turns in several for turn in turns} == {5}
    ordered = await made("--dataset-name", "sharegpt", "--dataset-path", talk, "--disable-shuffle", "--num-prompts", 5)
    assert [turn.tokens for (turn,) in ordered] == [9, 18, 27, 9, 18]


async def test_who_speaks_in_a_file_is_read_and_a_given_length_may_be_short(tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    for speakers, asked in (
        ("system human gpt human gpt", ["turn 1", "turn 3"]),
        ("gpt human gpt", ["turn 1"]),
        ("human system gpt", ["turn 0"]),
        ("user assistant user assistant", ["turn 0", "turn 2"]),
        ("human gpt gpt human gpt", ["turn 0"]),
    ):
        said = [{"from": who, "value": f"turn {n}"} for n, who in enumerate(speakers.split())]
        talk.write_text(json.dumps([{"conversations": said}]))
        flags = ("--dataset-path", talk, "--no-oversample", "--output-len", 3)
        (turns,) = await made("--dataset-name", "multi-turn", *flags)
        assert [turn.content for turn in turns] == asked
        (turns,) = await made("--dataset-name", "sharegpt", *flags)
        assert [(turn.content, turn.output_tokens) for turn in turns] == [(asked[0], 3)]
    talk.write_text(json.dumps([{"conversations": [{"value": "turn 0"}, {"value": "turn 1"}]}]))
    assert [turn.content for (turn,) in await made("--dataset-name", "sharegpt", *flags)] == ["turn 0"]


async def test_files_that_hold_nothing_to_send_are_refused_with_their_location(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for name, content, message in (
        ("custom", "", "holds nothing that can be sent"),
        ("custom", '{"prompt": "a"}\n{"prompt": 3}', "line 2: should be an object with a `prompt`"),
        ("custom", "{", "line 1: is no JSON"),
        ("custom", '{"prompt": "a"}\n{"prompt": "a\\ud83d"}', "line 2: cannot be sent as JSON: .*surrogates"),
        ("custom", '{"prompt": [99999999999999999999]}', "line 1: cannot be sent as JSON: .*64-bit"),
        ("custom", "[" * 100_000, "line 1: is no JSON"),
        ("sharegpt", '[{"conversations": [{"value": "\\ud83d"}]}]', "entry 0: cannot be sent as JSON"),
        ("sharegpt", "[]", "holds nothing that can be sent"),
        ("sharegpt", "[", "is no JSON"),
        ("sharegpt", "{}", "should be a list"),
        ("sharegpt", "[3]", "entry 0 is no conversation"),
        ("sharegpt", '[{"conversations": [{"value": 3}]}]', "entry 0 has a turn without a text"),
        ("multi-turn", '[{"conversations": [{"value": "a"}]}]', "holds nothing that can be sent"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=rf"--dataset-path .*{message}"):
            await made("--dataset-name", name, "--dataset-path", file)
    with pytest.raises(ConfigError, match=r"--dataset-path .*: .*No such file"):
        await made("--dataset-name", "custom", "--dataset-path", tmp_path / "none")
    path = prompts(file, ["a"])
    with pytest.raises(ConfigError, match="`output_tokens` should be"):
        await made("--dataset-name", "custom", "--dataset-path", path, "--custom-output-len", "-1")
    path = prompts(file, [[1, 2]])
    with pytest.raises(ConfigError, match="token ids, which a chat cannot say"):
        await made("--dataset-name", "custom", "--dataset-path", path, "--backend", "openai-chat")
    with pytest.raises(ConfigError, match=r"--tokenizer .*: should be `bytes`"):
        FileTokens(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"--tokenizer .*file"):
        FileTokens(file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--request-rate 0", "--request-rate: should be a number above 0, or inf, not '0'"),
        ("--request-rate -1", "--request-rate"),
        ("--request-rate nan", "--request-rate"),
        ("--request-rate fast", "--request-rate"),
        ("--burstiness 0", "--burstiness"),
        ("--num-prompts 0", "--num-prompts: should be a whole number above 0, not '0'"),
        ("--num-prompts 1.5", "--num-prompts"),
        ("--max-concurrency 0", "--max-concurrency"),
        ("--random-input-len 0", "--random-input-len"),
        ("--random-range-ratio 1", "--random-range-ratio"),
        ("--ramp-up-strategy linear", "needs --ramp-up-start-rps and --ramp-up-end-rps"),
        ("--ramp-up-start-rps 1", "--ramp-up-strategy"),
        ("--ramp-up-strategy linear --ramp-up-start-rps 2 --ramp-up-end-rps 1", "--ramp-up-end-rps"),
        ("--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 2 --request-rate 3", "--request-rate"),
        ("--ramp-up-strategy linear --ramp-up-start-rps 0 --ramp-up-end-rps 2", "--ramp-up-start-rps"),
        ("--dataset-name custom", "--dataset-path: needed"),
        ("--dataset-path x", "--dataset-path: random data is made, not read"),
        ("--goodput ttft", "--goodput"),
        ("--goodput itl:3", "--goodput: should be KEY:MILLISECONDS"),
        ("--goodput ttft:-1", "--goodput: should be a number of milliseconds"),
        ("--percentile-metrics ttft,x", "--percentile-metrics: 'x' is none of"),
        ("--metric-percentiles 101", "--metric-percentiles"),
        ("--header a", "--header"),
        ("--request-id-prefix a\r\nb:c", "--request-id-prefix: should be ASCII that a header can hold"),
        ("--header a=b\x01", "--header"),
        ("--extra-body [1]", "--extra-body: should be a JSON object"),
        ("--extra-body {", "--extra-body: is no JSON"),
        ('--extra-body {"seed":99999999999999999999}', "--extra-body: cannot be sent as JSON"),
        ("--top-k 99999999999999999999", "--top-k: cannot be sent as JSON"),
        ("--output-len 99999999999999999999", "--output-len: cannot be sent as JSON"),
        ("--model a\ud83d", "--model: cannot be sent as JSON"),
        ("--endpoint /v1/embeddings", "--endpoint /v1/embeddings: with --backend openai, should end in /completions"),
        ("--backend openai-chat --endpoint /v1/completions", "--endpoint"),
        ("--base-url ftp://a --model a", "--base-url ftp://a: should be as in"),
        ("--base-url http://a:b --model a", "--base-url http://a:b"),
        ("--tokenizer none --model a", "--tokenizer none"),
        ("--model a --tokenizer bytes --save-result --result-dir /proc/none", "--result-dir /proc/none"),
        ("--model a --tokenizer bytes --save-result --result-filename /proc", "--result-filename /proc"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["bench", "serve", *flags.split(" ")])
    except SystemExit as left:
        code = left.code
    reported = capsys.readouterr()
    assert code == 2
    assert message in reported.err
    assert reported.err.count("\n") == 1
    assert reported.out == ""
