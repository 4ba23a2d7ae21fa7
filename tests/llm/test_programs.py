"""Programs that end, fork, or change their event loop while they have a model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import HANG_SECONDS, clean_environment
from tests.launcher import Launcher


def run(launcher: Launcher, program: str) -> tuple[int, str, str]:
    """Its exit code and what it prints. It is forked, and ends as any program does."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as problems:
        code = launcher.start([program], clean_environment(), output, problems, module="tests.program").wait(
            HANG_SECONDS
        )
        output.seek(0)
        problems.seek(0)
        return code, output.read(), problems.read()


def test_a_model_belongs_to_its_event_loop(folder: Path, launcher: Launcher) -> None:
    """A loop that has been closed is missed by nobody: the engine's thread ends, and complains of nothing."""
    program = f"""
import asyncio, threading
from bdh_batch import AsyncLLM, SamplingParams
model = AsyncLLM({str(folder)!r})
async def leave_a_stream_open():
    return await model.open_stream("a", SamplingParams(max_tokens=100_000, ignore_eos=True), None)
stream = asyncio.run(leave_a_stream_open())
[engine] = [each for each in threading.enumerate() if each.name == "bdh-worker"]
engine.join()
for verb in (lambda: model.generate("a"), model.close):
    try:
        asyncio.run(verb())
    except RuntimeError as error:
        print("belongs to the event loop that loaded it" in str(error))
"""
    assert run(launcher, program) == (0, "True\nTrue\n", "")


def test_a_program_may_end_without_closing_it(folder: Path) -> None:
    """In the middle of a stream; with asyncio's own checks of what is called on which thread."""
    program = f"""
from bdh_batch import LLM, SamplingParams
llm = LLM({str(folder)!r})
pieces = llm.stream("x", SamplingParams(max_tokens=100_000, ignore_eos=True))
next(pieces)
raise SystemExit(3)
"""
    given = [sys.executable, "-X", "dev", "-c", program]
    done = subprocess.run(given, env=clean_environment(), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout) == (3, "")
    assert "Traceback" not in done.stderr


def test_a_forked_process_ends_and_says_that_the_model_is_not_its_own(folder: Path, launcher: Launcher) -> None:
    program = f"""
import multiprocessing
from bdh_batch import LLM, SamplingParams
llm = LLM({str(folder)!r})
pieces = llm.stream("x", SamplingParams(max_tokens=100_000, ignore_eos=True))
next(pieces)
def ask():
    try:
        llm.generate("a")
    except RuntimeError as error:
        print(error, flush=True)
child = multiprocessing.get_context("fork").Process(target=ask)
child.start()
child.join()
print(child.exitcode, len(next(pieces).token_ids))
"""
    code, output, problems = run(launcher, program)
    said, end = output.splitlines()
    assert said.startswith("This model is in the process that this one was forked from")
    assert (end, code, problems) == ("0 1", 0, "")
