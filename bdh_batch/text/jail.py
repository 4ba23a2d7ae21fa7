"""A chat template in a process of its own, which has little memory and little time: `python -m bdh_batch.text.jail`.

Whatever a template does, loops without end and gigabytes included, ends at worst that process; the next conversation
starts another. It renders one at a time. What is not covered: the process runs as the server's user, so behind Jinja's
sandbox there is no second wall, only an environment without the server's settings.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from jinja2 import TemplateError

from bdh_batch.errors import CheckpointError
from bdh_batch.text.template import Question, Refused, Rendered, Template

MEMORY = 2**30  # bytes
SECONDS = 5.0  # for one conversation
START_SECONDS = 60.0  # for Python's start, and to compile the template


class Jail:
    """
    Args:
        name: of the template, in errors.

    Raises:
        CheckpointError: the template does not compile.
    """

    def __init__(self, source: str, name: str, seconds: float = SECONDS) -> None:
        self._source = source
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._thread = ThreadPoolExecutor(1, "bdh-chat-template")
        try:
            self._start()
        except Refused as error:
            self.close()
            raise CheckpointError(f"{name}: {error}") from error

    async def render(self, question: Question) -> Rendered:
        """
        Raises:
            Refused: the template cannot make a prompt of this, or not within its bounds.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.render_now, question)

    def render_now(self, question: Question) -> Rendered:
        """As `render`, in the caller's thread; not from two at once."""
        if self._process is None:
            self._start()
        answer = self._ask(asdict(question), self._seconds)
        return Rendered(answer["text"], tuple(answer["ends"]))

    def close(self) -> None:
        """Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name if __spec__ else __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is the server's affair
            text=True,
        )
        self._ask({"source": self._source}, START_SECONDS)

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        overdue = threading.Timer(seconds, process.kill)
        overdue.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            overdue.cancel()
        if not line.endswith("\n"):  # it was killed, by its timer or for want of memory
            self._end()
            raise Refused(f"it takes more than {seconds:g} s or {MEMORY >> 20} MiB")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what it was not told before it ended; it need not know any more
                continue


def _environment() -> dict[str, str]:
    """The server's, without its settings, some of which are secret; and with where this package is."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("BDH_")}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}


def answer(questions: IO[str], answers: IO[str]) -> None:
    """Reads a template, then questions, a line of JSON each; writes a line for each."""

    def say(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        template = Template(json.loads(questions.readline())["source"])
    except (TemplateError, MemoryError) as error:
        say({"error": str(error)})
        return
    say({})
    for line in questions:
        try:
            say(asdict(template.render(Question(**json.loads(line)))))
        except (Refused, MemoryError) as error:
            say({"error": str(error) or "it needs too much memory"})


def main() -> None:
    if sys.platform == "linux":  # elsewhere the limit does not hold, and only time is bounded
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answer(sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
