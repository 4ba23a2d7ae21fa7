"""`bdh-batch run`: a model at the terminal, and in a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bdh_batch import LLM, SamplingParams, settings
from bdh_batch.errors import InvalidRequest
from bdh_batch.shell.session import Session
from bdh_batch.shell.talk import Terminal, talk
from tests.conftest import CONFORMANCE, HANG_SECONDS, ROOT, clean_environment, command, eventually

TINY = CONFORMANCE / "tiny"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
BRIEF = "/set temperature 0\n/set max_tokens 6\n"

# Becomes a command whose terminal is that of its input, from where Ctrl-C comes.
# What a shell in the background ignores, the terminal's does not.
AT_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.argv[1], sys.argv[1:])
"""

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(TINY) as llm:
        yield llm


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with LLM(TINY, chat_template=template) as llm:
        yield llm


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """The exit code, the output and the errors for lines of a pipe."""

    def run(session: Session, text: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = Terminal(session).run()
        return code, *capsys.readouterr()

    return run


def completed(llm: LLM, prompt: str) -> str:
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text


def test_each_line_goes_on_from_those_before(llm: LLM, typed: Typed) -> None:
    session = Session(llm, llm.has_chat_template)
    code, output, errors = typed(session, f"{BRIEF}hi\n\nho\n/bye\nhum\n")
    first = completed(llm, "hi")
    second = completed(llm, f"hi{first}\nho")
    assert (code, output, errors) == (0, f"{first}\n{second}\n", "")
    assert [each["content"] for each in session.turns] == ["hi", first, "ho", second]


def test_a_model_with_a_template_chats(chatty: LLM, typed: Typed) -> None:
    session = Session(chatty, chatty.has_chat_template)
    assert session.is_chat
    code, output, _ = typed(session, f'{BRIEF}/system be brief\n"""two\nlines"""\nho')
    first = completed(chatty, "<system>be brief\n<user>two\nlines\n<a>")
    second = completed(chatty, f"<system>be brief\n<user>two\nlines\n<assistant>{first}\n<user>ho\n<a>")
    assert (code, output) == (0, f"{first}\n{second}\n")


def test_a_conversation_is_saved_loaded_and_cleared(llm: LLM, typed: Typed, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    session = Session(llm, False)
    assert typed(session, f"{BRIEF}hi\n/save {file}\n/clear\n")[0] == 0
    assert session.turns == []
    other = Session(llm, False)
    _, output, errors = typed(other, f"/load {file}\n/show\n")
    assert "1 turns" in output
    assert "max_tokens" in output
    assert errors == ""
    assert [each["content"] for each in other.turns] == ["hi", completed(llm, "hi")]
    assert other.given == {"temperature": 0, "max_tokens": 6}
    session.set("max_tokens", None)
    assert session.given == {"temperature": 0}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/what", "no such command"),
        ("/set", None),
        ("/set heat 5", "heat: there is no such parameter"),
        ("/set temperature hot", "temperature: Input should be a valid number"),
        ("/set temperature 3", "temperature: Input should be less"),
        ("/set n 2", "n: there is no such parameter"),
        ('/set structured_outputs {"regex": "a", "json": {}}', "structured_outputs"),
        ("/system x", "no chat template"),
        ("/save", "/save FILE: which file?"),
        ("/save /nowhere/file", "No such file"),
        ("/load /nowhere/file", "No such file"),
        (f"/load {TINY / 'config.json'}", "is no conversation"),
        (f"/load {TINY / 'model.safetensors'}", "is no JSON"),
        ("/help", None),
    ],
)
def test_a_line_that_is_wrong_is_reported_and_the_next_one_goes_on(
    llm: LLM, typed: Typed, line: str, problem: str | None
) -> None:
    code, output, errors = typed(Session(llm, False), f"{BRIEF}{line}\nhi\n")
    assert output.endswith(f"{completed(llm, 'hi')}\n")
    assert code == int(problem is not None)
    assert (problem or "") in errors
    assert bool(errors) == (problem is not None)


def test_a_file_of_another_kind_changes_nothing(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    session = Session(llm, False, turns=[{"role": "user", "content": "hi"}])
    good: dict[str, object] = {"kind": "bdh-batch conversation", "system": "", "parameters": {}, "turns": []}
    wrong: object
    for wrong in ([], good | {"kind": "x"}, good | {"turns": [5]}, good | {"turns": None}, good | {"system": 5}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(InvalidRequest):
            session.load(file)
    file.write_text(json.dumps(good | {"parameters": {"temperature": 5}}))
    with pytest.raises(InvalidRequest, match="temperature"):
        session.load(file)
    assert len(session.turns) == 1


def test_a_pipe_and_one_prompt(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    given = {"model.path": str(TINY), "generation.max_tokens": 6, "generation.temperature": 0}
    chosen = settings.load(None, given.items()).settings
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\xff"), "utf-8"))
    assert talk(chosen, None) == 0
    first = completed(llm, "hi")
    second = completed(llm, f"hi{first}\n\ufffd")
    assert capsysbinary.readouterr() == (f"{first}\n{second}\n".encode(), b"")
    assert talk(chosen, "hi") == 0
    assert capsysbinary.readouterr() == (f"{first}\n".encode(), b"")
    assert talk(chosen, "") == 1
    assert capsysbinary.readouterr().err.startswith(b"bdh-batch: prompt: Input should not be empty")
    monkeypatch.setattr("sys.stdin", None)  # as of a program that was started with none
    assert talk(chosen, None) == 0
    assert talk(chosen, "hi") == 0
    assert capsysbinary.readouterr() == (f"{first}\n".encode(), b"")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
def test_at_a_terminal_a_response_can_be_stopped() -> None:
    ours, theirs = pty.openpty()
    given = command("run", "--model", TINY, "--set", "generation.max_tokens=100000")
    process = subprocess.Popen(
        [sys.executable, "-c", AT_TERMINAL, *given],
        cwd=ROOT,
        env=clean_environment() | {"TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""

    def until(mark: bytes, more: int = 0, press: bytes = b"") -> None:
        """Reads up to `mark`, and `more` bytes; `press` is pressed again and again until then."""
        nonlocal shown
        end = time.monotonic() + HANG_SECONDS
        while (at := shown.find(mark)) < 0 or len(shown) < at + len(mark) + more:
            assert time.monotonic() < end, shown
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 65536)
            elif press:
                os.write(ours, press)
        shown = shown[at + len(mark) :]

    def is_left() -> bool:
        """Presses Ctrl-D: once may be before the terminal has been set to lines that are edited."""
        if process.poll() is None:
            os.write(ours, b"\x04")
        return process.poll() is not None

    try:
        until(b">>> ")
        os.write(ours, b"hi\n")
        until(b"hi", more=200)
        os.write(ours, b"\x03")
        until(b">>> ")
        os.write(ours, b"/set max_tokens 5\n/show\n")
        until(b"turns")
        until(b"/bye ends", press=b"\x03")
        until(b">>> ")
        eventually(is_left)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
