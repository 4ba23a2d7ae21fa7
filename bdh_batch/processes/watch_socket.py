"""A process shows what it counts, and its next steps, at a socket in the runtime folder, where front ends ask for them.

A question and its answer are one line of JSON each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdh_batch.errors import Unavailable
from bdh_batch.observability.figures import Figures
from bdh_batch.observability.watched import StepRecord, Watched
from bdh_batch.processes.folder import RuntimeFolder

SECONDS = 1.0  # within which a process has to answer, beside what it waits for
LONGEST = 16 * 2**20  # bytes of an answer: 200 steps of 64 sequences, with the longest ids, are less
FIGURES, STEPS = "figures", "steps"


async def show(watched: Watched, path: Path) -> asyncio.AbstractServer:
    """Has front ends ask this process."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):  # whoever asked has left
            async with asyncio.timeout(SECONDS):
                question = json.loads(await reader.readline())
            writer.write(await _answer(watched, question))
            async with asyncio.timeout(SECONDS):
                await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(answer, str(path))


async def _answer(watched: Watched, question: Mapping[str, Any]) -> bytes:
    if question["ask"] == FIGURES:
        return watched.figures().dump()
    try:
        steps = await watched.steps(question["model"], question["count"], question["seconds"])
    except Unavailable as error:
        return json.dumps({"error": str(error), "retry_after": error.retry_after}).encode() + b"\n"
    return json.dumps({"steps": steps}).encode() + b"\n"


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
        found = {name: json.loads(answer) for name, answer in (await self._ask(question, seconds + SECONDS)).items()}
        for answer in found.values():
            if "error" in answer:
                raise Unavailable(answer["error"], answer["retry_after"])
        return {name: answer["steps"] for name, answer in found.items() if answer["steps"] is not None}

    async def _ask(self, question: Mapping[str, object], seconds: float) -> Mapping[str, bytes]:
        sockets = {name: path for name, path in self._folder.watching().items() if name != self._name}
        line = json.dumps(question).encode() + b"\n"
        answers = await asyncio.gather(*(_ask(path, line, seconds) for path in sockets.values()))
        return {name: answer for name, answer in zip(sockets, answers, strict=True) if answer}


async def _ask(socket: Path, question: bytes, seconds: float) -> bytes:
    """Returns the answer of a process; empty where it has ended, or is too busy."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(str(socket), limit=LONGEST)
            try:
                writer.write(question)
                return await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""
