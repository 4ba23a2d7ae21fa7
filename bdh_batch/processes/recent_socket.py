"""Front ends ask each other for completions that ended a short while ago, at sockets in the runtime folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
from array import array
from collections.abc import Iterable
from pathlib import Path

from bdh_batch.store.recent import Completion, Recent

SECONDS = 2.0  # within which another process has to answer
LONGEST = 64 * 1024  # bytes of a question


async def answer(recent: Recent, path: Path) -> asyncio.AbstractServer:
    """Has others ask for what this process remembers."""

    async def write(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(SECONDS):
                owner, id = json.loads(await reader.readline())
                if (found := recent.get(owner, id)) is not None:
                    writer.write(json.dumps([found.model, found.salt]).encode() + b"\n" + found.tokens().tobytes())
                await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(write, str(path), limit=LONGEST)


async def ask(sockets: Iterable[Path], owner: str, id: str) -> Completion | None:
    """What one of the other processes remembers."""
    found = await asyncio.gather(*(_ask(path, owner, id) for path in sockets))
    return next((each for each in found if each is not None), None)


async def _ask(socket: Path, owner: str, id: str) -> Completion | None:
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(json.dumps([owner, id]).encode() + b"\n")
                head, tokens = await reader.readline(), await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):  # it has ended, or is busy
        return None
    if not head:
        return None
    model, salt = json.loads(head)
    return Completion(model, salt, array("i", tokens))
