"""The processes of a server ask each other, at a socket that each has in the runtime folder.

A question is a line of JSON, a list of its kind and its arguments. An answer is text, and ends with `END`: one that was
cut short, as its process has ended, is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

SECONDS = 2.0  # within which a question has to come, and each part of its answer be read
LONGEST = 64 * 1024  # bytes of a question
END = b"\0"

Answer = Callable[..., AsyncGenerator[bytes, None]]


async def answer(path: Path, answers: Mapping[str, Answer], patient: Collection[str] = ()) -> asyncio.AbstractServer:
    """Has other processes ask this one, at a new socket.

    Args:
        answers: by the kinds of questions, what returns the parts of an answer; what else is asked has none.
        patient: the kinds whose answers may be read as slowly as whoever asked likes.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):  # whoever asked has left, or asked too much
            async with asyncio.timeout(SECONDS):
                kind, *arguments = json.loads(await reader.readline())
            if kind in answers:
                parts = _send(answers[kind](*arguments), writer, None if kind in patient else SECONDS)
                await _unless_left(reader, parts)
        writer.close()

    return await asyncio.start_unix_server(serve, str(path), limit=LONGEST)


async def _send(parts: AsyncGenerator[bytes, None], writer: asyncio.StreamWriter, seconds: float | None) -> None:
    """Sends an answer. Raises TimeoutError where a part of it is not read within `seconds`."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            writer.write(part)
            async with asyncio.timeout(seconds):
                await writer.drain()
    writer.write(END)


async def _unless_left(reader: asyncio.StreamReader, sending: Coroutine[None, None, None]) -> None:
    """Sends an answer until whoever asked has closed the connection: nothing more need come of it then."""
    answering, left = asyncio.ensure_future(sending), asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait((answering, left), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        answering.cancel()
        left.cancel()
        await asyncio.gather(answering, left, return_exceptions=True)


async def ask(sockets: Mapping[str, Path], seconds: float, *question: Any) -> dict[str, bytes]:
    """Returns what processes answer, by their names.

    Args:
        sockets: of the processes, by their names.
        seconds: within which an answer has to be there; late ones are left out, as are empty ones.
        question: its kind and its arguments.
    """
    line = json.dumps(question).encode() + b"\n"
    answers = await asyncio.gather(*(_ask(path, seconds, line) for path in sockets.values()))
    return {name: each for name, each in zip(sockets, answers, strict=True) if each}


async def first(sockets: Mapping[str, Path], seconds: float, *question: Any) -> tuple[str, bytes] | None:
    """Returns the first answer that is not empty, and the name of its process; None where no process has one.

    Raises:
        TimeoutError: there is none within `seconds`, and some have not answered.
    """
    line = json.dumps(question).encode() + b"\n"

    async def asked(name: str, path: Path) -> tuple[str, bytes | None]:
        return name, await _ask(path, seconds, line)

    asking, is_late = [asyncio.create_task(asked(*each)) for each in sockets.items()], False
    try:
        for each in asyncio.as_completed(asking):
            name, found = await each
            if found:
                return name, found
            is_late = is_late or found is None
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    if is_late:
        raise TimeoutError
    return None


async def follow(socket: Path, seconds: float, *question: Any) -> AsyncIterator[bytes]:
    """Yields the answer of one process as it comes.

    Args:
        seconds: within which each part of it has to come.

    Raises:
        OSError: the process has ended before its answer did, or (TimeoutError) is silent.
    """
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        writer.write(json.dumps(question).encode() + b"\n")
        while True:
            async with asyncio.timeout(seconds):
                piece = await reader.read(LONGEST)
            if not piece:
                raise ConnectionResetError("it has ended")
            if piece.endswith(END):
                yield piece[: -len(END)]
                return
            yield piece
    finally:
        writer.close()


async def _ask(socket: Path, seconds: float, line: bytes) -> bytes | None:
    """The answer: empty where the process has none, or has ended; None where it is late."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(line)
                answer = await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return None
    except OSError:
        return b""
    return answer[: -len(END)] if answer.endswith(END) else b""
