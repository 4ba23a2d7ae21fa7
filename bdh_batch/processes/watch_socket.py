"""A process shows what it counts, and its next steps, at a socket in the runtime folder, where front ends ask for them.

A question is a line of JSON, and so is an answer, behind which steps come in lines of their own: no process encodes or
parses many at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdh_batch.errors import Unavailable
from bdh_batch.observability.figures import Figures
from bdh_batch.observability.watched import StepRecord, Watched
from bdh_batch.processes.folder import RuntimeFolder

SECONDS = 1.0  # within which a process has to answer, beside what it waits for
STEPS_SECONDS = 10.0  # within which recorded steps, some megabytes at most, have to be there
FIGURES, STEPS = "figures", "steps"


async def show(watched: Watched, path: Path) -> asyncio.AbstractServer:
    """Has front ends ask this process."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):  # whoever asked has left
            async with asyncio.timeout(SECONDS):
                question = json.loads(await reader.readline())
            async for line in _answer(watched, question):
                writer.write(line)
                async with asyncio.timeout(SECONDS):
                    await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(answer, str(path))


async def _answer(watched: Watched, question: Mapping[str, Any]) -> AsyncIterator[bytes]:
    if question["ask"] == FIGURES:
        yield watched.figures().dump()
        return
    try:
        steps = await watched.steps(question["model"], question["count"], question["seconds"])
    except Unavailable as error:
        yield _line({"error": str(error), "retry_after": error.retry_after})
        return
    yield _line({"has_model": steps is not None})
    for step in steps or ():
        yield _line(step)
        await asyncio.sleep(0)


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


class WatchSockets:
    """The other processes of a server. Implements `OtherProcesses`.

    Args:
        name: of this process, which is not asked.
    """

    def __init__(self, folder: RuntimeFolder, name: str) -> None:
        self._folder = folder
        self._name = name

    async def figures(self) -> Mapping[str, Figures]:
        answers = await self._ask({"ask": FIGURES}, SECONDS)
        return {name: Figures.load(answer) for name, answer in answers.items()}

    async def steps(self, model: str, count: int, seconds: float) -> Mapping[str, Sequence[StepRecord]]:
        question = {"ask": STEPS, "model": model, "count": count, "seconds": seconds}
        found = {}
        for name, answer in (await self._ask(question, seconds + STEPS_SECONDS)).items():
            head, *lines = answer.splitlines()
            known = json.loads(head)
            if "error" in known:
                raise Unavailable(known["error"], known["retry_after"])
            if known["has_model"]:
                found[name] = [await _parsed(line) for line in lines]
        return found

    async def _ask(self, question: Mapping[str, object], seconds: float) -> Mapping[str, bytes]:
        sockets = {name: path for name, path in self._folder.watching().items() if name != self._name}
        answers = await asyncio.gather(*(_ask(path, _line(question), seconds) for path in sockets.values()))
        return {name: answer for name, answer in zip(sockets, answers, strict=True) if answer}


async def _parsed(line: bytes) -> StepRecord:
    await asyncio.sleep(0)
    found: StepRecord = json.loads(line)
    return found


async def _ask(socket: Path, question: bytes, seconds: float) -> bytes:
    """Returns the answer of a process; empty where it has ended, or is too busy."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(question)
                answer = await reader.read()
                return answer[: answer.rfind(b"\n") + 1]  # whole lines: it may have ended meanwhile
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""
