"""A front-end process: serves HTTP at the supervisor's sockets, with engines in other processes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.remote_engines import RemoteEngines
from bdh_batch.processes.service import Service, run_until_signal
from bdh_batch.settings import Settings

SCRAPE_SECONDS = 2.0  # within which another front end has to report its metrics


async def run_front_end(
    settings: Settings,
    folder: RuntimeFolder,
    name: str,
    listeners: Sequence[socket.socket],
    on_ready: Callable[[str, str], None],
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        name: of this process; the others find its metrics by it.

    Raises:
        ConfigError, CheckpointError: it cannot start.
    """
    folder.forget(name)
    engines = RemoteEngines(settings, folder)
    # The path of a Unix socket is the supervisor's to remove.
    server = settings.server.model_copy(update={"uds": None})
    service = Service(settings.model_copy(update={"server": server}), lambda *_: engines, on_ready, listeners)

    async def others() -> Mapping[str, bytes]:
        """Returns the metrics of the engines and of the other front ends."""
        sockets = {other: path for other, path in folder.front_ends().items() if other != name}
        pages = await asyncio.gather(*(_read(path) for path in sockets.values()))
        found = {other: page for other, page in zip(sockets, pages, strict=True) if page}
        return {**found, **await engines.expositions()}

    service.metrics.join(name, others)
    reporting = await _report(service.metrics, folder.front_end(name))
    try:
        await run_until_signal(service)
    finally:
        reporting.close()
        engines.close()


async def _report(metrics: Metrics, socket: Path) -> asyncio.AbstractServer:
    """Serves this process's metrics to the other front ends, at a socket."""

    async def write(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(metrics.exposition())
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(write, str(socket))


async def _read(socket: Path) -> bytes:
    """Returns another front end's metrics; nothing where it does not respond in time."""
    try:
        async with asyncio.timeout(SCRAPE_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""
