"""A process reports its metrics at a socket in the runtime folder, where the front end that is scraped reads them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

SCRAPE_SECONDS = 2.0  # within which a process has to report


async def report(exposition: Callable[[], bytes], path: Path) -> asyncio.AbstractServer:
    """Serves the metrics of this process at a socket."""

    async def write(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(exposition())
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(write, str(path))


async def read_all(sockets: Mapping[str, Path]) -> Mapping[str, bytes]:
    """Returns what processes report, by their names, without those that do not respond in time."""
    pages = await asyncio.gather(*(_read(path) for path in sockets.values()))
    return {name: page for name, page in zip(sockets, pages, strict=True) if page}


async def _read(socket: Path) -> bytes:
    try:
        async with asyncio.timeout(SCRAPE_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""
