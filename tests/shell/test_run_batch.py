"""A file of requests gets the responses that they get over HTTP, each once, however often the run is interrupted."""

from __future__ import annotations

import asyncio
import fcntl
import json
import signal
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from starlette.types import ASGIApp

from bdh_batch import settings
from bdh_batch.errors import ConfigError
from bdh_batch.http.app import create_app
from bdh_batch.llm.choosing import in_process
from bdh_batch.llm.window import Window
from bdh_batch.processes.in_process import InProcess
from bdh_batch.shell.batch_input import BatchInput
from bdh_batch.shell.batch_output import BatchOutput
from bdh_batch.shell.run_batch import respond, run_batch
from tests.conftest import CONFORMANCE, START_SECONDS, clean_environment
from tests.launcher import Launcher

if TYPE_CHECKING:
    from tests.conftest import Cli, Server

TINY = CONFORMANCE / "tiny"
MOST = 2**20
OF_ONE_RESPONSE = ("id", "created", "created_at", "completed_at")
MESSAGES = [{"role": "user", "content": "Who? €"}]


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


REQUESTS = [
    line("text", "/v1/completions", prompt="To be", max_tokens=4, seed=1),
    line("texts", "/v1/completions", prompt=["a", "b"], n=2, max_tokens=3, seed=2, logprobs=1),
    line("chat", "/v1/chat/completions", messages=MESSAGES, max_tokens=5, seed=3),
    line("vector", "/v1/embeddings", input=["O Romeo", "O Juliet"], dimensions=3),
    line("response", "/v1/responses", input="Who?", max_output_tokens=4, temperature=0, store=False),
    line("wrong", "/v1/completions", prompt="a", temperature=-1),
    line("unknown", "/v1/chat/completions", messages=MESSAGES, max_new_tokens=5),
]


@pytest.fixture(scope="module")
async def app() -> AsyncIterator[ASGIApp]:
    chosen = in_process(settings.load(None, [("model.path", str(TINY))]).settings)
    host = await InProcess.open(chosen, chosen.settings)
    yield create_app(host.serving)
    await host.close()


def written(path: Path, lines: Sequence[object]) -> Path:
    texts = (each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


async def run(app: ASGIApp, source: Path, target: Path, most: int = 4) -> list[dict[str, Any]]:
    """The lines of the output."""
    lines = BatchInput(source, MOST)
    with BatchOutput(target, lines.digests) as output:
        await respond(app, Window(most), lines, output)
        assert output.lines == len(lines)
    return parsed(target)


def parsed(target: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in target.read_text().splitlines()]


async def test_responses_are_those_over_http(app: ASGIApp, tiny: Server, tmp_path: Path) -> None:
    output = await run(app, written(tmp_path / "in", REQUESTS), tmp_path / "out")
    by_id = {each["custom_id"]: each for each in output}
    assert by_id.keys() == {each["custom_id"] for each in REQUESTS}
    assert len({each["id"] for each in output}) == len(output)
    for request in REQUESTS:
        mine = by_id[request["custom_id"]]
        theirs = tiny.http.post(request["url"], json=request["body"])
        assert mine.keys() == {"id", "custom_id", "response", "error"}
        assert (mine["response"]["status_code"], mine["error"]) == (theirs.status_code, None)
        assert without_ids(mine["response"]["body"]) == without_ids(theirs.json())
        assert len(mine["response"]["request_id"]) == 32


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_ids(each) for name, each in value.items() if name not in OF_ONE_RESPONSE}
    return [*map(without_ids, value)] if isinstance(value, list) else value


BAD: dict[str, tuple[object, str | None, str]] = {
    "no json": ("{", None, "invalid_json"),
    "no object": ("[1]", None, "invalid_json"),
    "no id": ({"method": "POST", "url": "/v1/completions", "body": {}}, None, "invalid_custom_id"),
    "an id that is a number": ({**REQUESTS[0], "custom_id": 5}, None, "invalid_custom_id"),
    "get": ({**REQUESTS[0], "method": "GET"}, "text", "invalid_method"),
    "another url": ({**REQUESTS[0], "url": "/metrics"}, "text", "invalid_url"),
    "no url": ({**REQUESTS[0], "url": None}, "text", "invalid_url"),
    "no body": ({**REQUESTS[0], "body": "x"}, "text", "invalid_body"),
    "a body too deep to be written": (
        line("text", "/v1/completions", prompt="a", metadata=json.loads("[" * 300 + "]" * 300)),
        *("text", "invalid_body"),
    ),
    "a stream": (line("text", "/v1/completions", prompt="a", stream=True), "text", "unsupported_parameter"),
    "later": (line("text", "/v1/responses", input="a", background=True), "text", "unsupported_parameter"),
    "a member": ({**REQUESTS[0], "priority": 1}, "text", "unknown_member"),
    "too long": (line("text", "/v1/completions", prompt="x" * (MOST + 2**17)), None, "line_too_long"),
}


async def test_bad_lines_get_lines_that_say_so(app: ASGIApp, tmp_path: Path) -> None:
    good = line("good", "/v1/completions", prompt="a", max_tokens=1)
    lines = [wrong for wrong, _, _ in BAD.values()]
    again = line("good", "/v1/completions", prompt="b")
    source = written(tmp_path / "in", ["", good, *lines, "  ", again])
    output = {int(each["id"].split("_")[2]): each for each in await run(app, source, tmp_path / "out")}
    assert [*sorted(output)] == [*range(2, len(lines) + 3), len(lines) + 4]
    assert output[2]["response"]["status_code"] == 200
    for number, (_, custom_id, code) in enumerate(BAD.values(), 3):
        found = output[number]
        # All have the same custom_id, but it is the first thing that is wrong with a line that counts.
        assert found["error"]["code"] in (code, "duplicate_custom_id")
        assert (found["custom_id"], found["response"], found["error"]["line"]) == (custom_id, None, number)
    assert output[len(lines) + 4]["error"]["code"] == "duplicate_custom_id"


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_line(case: str, tmp_path: Path) -> None:
    wrong, custom_id, code = BAD[case]
    lines = BatchInput(written(tmp_path / "in", [wrong]), MOST)
    with BatchOutput(tmp_path / "out", lines.digests) as output:
        asyncio.run(respond(nobody, Window(1), lines, output))
        assert (output.lines, output.failed) == (1, 1)
    found = json.loads((tmp_path / "out").read_text())
    assert (found["custom_id"], found["response"], found["error"]["code"]) == (custom_id, None, code)
    assert found["error"]["message"]


async def nobody(*_: object) -> None:
    raise AssertionError("nothing is asked for")


TORN: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda whole: b"",
    "one character": lambda whole: whole[:1],
    "within an id": lambda whole: whole[:20],
    "without its last brace": lambda whole: whole[: whole.index(b"\n") - 1],
    "without its end of line": lambda whole: whole[: whole.index(b"\n")],
    "one line": lambda whole: whole[: whole.index(b"\n") + 1],
    "a line and a character": lambda whole: whole[: whole.index(b"\n") + 2],
    "half a character": lambda whole: whole[: whole.index("€".encode()) + 1],
    "in the middle": lambda whole: whole[: len(whole) // 2],
    "all but an end of line": lambda whole: whole[:-1],
    "all": lambda whole: whole,
    "zeros": lambda whole: whole[: whole.index(b"\n") + 1] + bytes(500),
    "a line with zeros in it": lambda whole: whole[: whole.index(b"\n") + 40] + bytes(99) + b"\n",
}


@pytest.fixture(scope="module")
async def whole(app: ASGIApp, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An input, and its whole output."""
    folder = tmp_path_factory.mktemp("batch")
    echo = line("€", "/v1/completions", prompt="€", echo=True, max_tokens=1)
    source = written(folder / "in", [*REQUESTS, echo, "bad"])
    await run(app, source, folder / "out", most=2)
    return source, (folder / "out").read_bytes()


@pytest.mark.parametrize("case", TORN)
async def test_a_run_goes_on_from_wherever_it_was_cut_off(
    app: ASGIApp, whole: tuple[Path, bytes], tmp_path: Path, case: str
) -> None:
    source, complete = whole
    begun = TORN[case](complete)
    (tmp_path / "out").write_bytes(begun)
    output = await run(app, source, tmp_path / "out")
    assert sorted(each["id"] for each in output) == sorted(json.loads(each)["id"] for each in complete.splitlines())
    kept = begun[: begun.rfind(b"}\n") + 2] if b"}\n" in begun else b""
    assert (tmp_path / "out").read_bytes().startswith(kept)


def test_a_process_that_is_killed_goes_on(launcher: Launcher, cli: Cli, tmp_path: Path) -> None:
    lines = [
        line(f"r{index}", "/v1/completions", prompt=f"{index}", max_tokens=2 + 25 * index, ignore_eos=True, seed=index)
        for index in range(24)
    ]
    source = written(tmp_path / "in", lines)
    for number in range(20):  # a run takes about a second: where the test is late, it is interrupted too late
        command = ["run-batch", "-i", source, "-o", tmp_path / f"out-{number}", "--model", TINY]
        if is_interrupted(launcher, command, tmp_path / f"out-{number}", len(lines)):
            break
    else:
        raise AssertionError("no run was interrupted")
    ended = cli(*command)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert f"of {len(lines)} lines are new" in ended.stderr
    output = parsed(tmp_path / f"out-{number}")
    assert sorted(each["custom_id"] for each in output) == sorted(each["custom_id"] for each in lines)
    tokens = {each["custom_id"]: each["response"]["body"]["usage"]["completion_tokens"] for each in output}
    assert tokens == {each["custom_id"]: each["body"]["max_tokens"] for each in lines}


def is_interrupted(launcher: Launcher, command: list[Any], target: Path, most: int) -> bool:
    """Starts the command and interrupts it, three times; returns whether it was still at work each time."""

    def done() -> int:
        return target.read_bytes().count(b"\n") if target.exists() else 0

    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        more = done() + 3
        with target.with_suffix(".log").open("w+b") as log:
            process = launcher.start(command, clean_environment(), log)
            end = time.monotonic() + START_SECONDS
            while done() < more and process.poll() is None:  # looked at often
                assert time.monotonic() < end, "no line was written"
                time.sleep(0.002)
            process.send_signal(number)
            if process.wait(START_SECONDS) == 0:
                return False
            assert process.returncode == code
        if not more <= done() < most:
            return False
    return True


def test_what_cannot_be_an_input_or_an_output(tmp_path: Path) -> None:
    source = written(tmp_path / "in", REQUESTS[:1])
    chosen = settings.load(None, [("model.path", str(TINY))]).settings
    elsewhere = written(tmp_path / "text", ["a text of somebody's"])
    other = written(tmp_path / "other", [{"id": "batch_req_1_00000001", "response": {"status_code": 200}}])
    digest = f"{BatchInput(source, MOST).digests[1]:08x}"
    beyond = written(tmp_path / "beyond", [{"id": "batch_req_999999999999_00000001", "response": None}])
    twice = written(tmp_path / "twice", [{"id": f"batch_req_1_{digest}", "response": None}] * 2)
    for given, target, named in (
        (tmp_path / "none", tmp_path / "out", "-i: .*none cannot be read"),
        (tmp_path, tmp_path / "out", "-i: .* is no regular file"),
        (source, source, "-o: .*in is"),
        (source, tmp_path / "none" / "out", "-o: .* cannot be written"),
        (source, tmp_path, "-o: .* cannot be written"),
        (source, Path("/dev/null"), "-o: /dev/null is no regular file"),
        (source, elsewhere, "line 1 is not one of run-batch"),
        (source, other, "is of another input: there, line 1 is another one"),
        (source, beyond, "is of another input: there, line 999999999999 is another one"),
        (source, twice, "has the response to line 1 twice"),
    ):
        with pytest.raises(ConfigError, match=named):
            run_batch(chosen, given, target)
    assert elsewhere.read_text() == "a text of somebody's\n"
    with (tmp_path / "out").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another run"):
            run_batch(chosen, source, tmp_path / "out")


def test_an_empty_input_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings.load(None, [("model.path", "/nowhere")]).settings  # which nobody needs
    assert run_batch(chosen, written(tmp_path / "in", ["", " "]), tmp_path / "out") == 0
    assert (tmp_path / "out").read_bytes() == b""
    assert "0 of 0 lines are new" in capsys.readouterr().err


def test_a_long_input_takes_little_memory(tmp_path: Path) -> None:
    count = 50_000
    with (tmp_path / "in").open("w") as file:
        for index in range(count):
            print(json.dumps(line(f"request-{index % (count - 5)}", "/v1/completions", prompt="x" * 100)), file=file)
    tracemalloc.start()
    lines = BatchInput(tmp_path / "in", MOST)
    repeated = sum(lines._repeated)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(lines), repeated) == (count, 5)
    assert peak < 60 * count, "some tens of bytes for a line"
