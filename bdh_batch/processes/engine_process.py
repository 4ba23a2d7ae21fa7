"""An engine process: loads the model, and serves front ends at a Unix socket until SIGTERM.

It serves no HTTP and runs no templates; no client can reach it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable

from bdh_batch.engine.loading import load_engine
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.local_engine import LoadEngine
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.processes.others import answers_of
from bdh_batch.processes.questions import answer
from bdh_batch.processes.served_engine import ServedEngine

log = logging.getLogger(__name__)

UNHEALTHY_SECONDS = 2.0  # in which front ends move the streams
BEAT_SECONDS = 1.0  # between two heartbeats for the supervisor


async def run_engine(
    model: ModelSettings,
    folder: RuntimeFolder,
    name: str,
    on_ready: Callable[[], None],
    load: LoadEngine = load_engine,
) -> None:
    """Serves front ends until SIGTERM, then until its streams have moved to other engines, or ended.

    Args:
        folder: of the model's engines.
        name: of its socket there.
        on_ready: is called once front ends can connect.
        load: makes the engine, off the event loop.

    Raises:
        ConfigError, CheckpointError: it cannot start.
    """
    leaving = _signalled()
    engine = await ServedEngine.open(model, folder.secret, folder.step(name), load)
    folder.agree(engine.port.welcome.fingerprint)
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(engine.port.new_connection, sock=folder.listen(name))
    folder.questions(name).unlink(missing_ok=True)
    answering = await answer(folder.questions(name), answers_of(engine.exposition, engine.watched))
    folder.beat(name)
    beating = asyncio.create_task(_beat(folder, name))
    watching = asyncio.create_task(_end_when_unhealthy(engine.backend.health))
    try:
        on_ready()
        await leaving.wait()
        watching.cancel()
        await engine.leave(model.settings.server.drain_seconds)
    finally:
        server.close()
        answering.close()
        await engine.close()
        beating.cancel()


async def _beat(folder: RuntimeFolder, name: str) -> None:
    """Has the supervisor see that this process does not hang."""
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        try:
            folder.beat(name)
        except OSError as error:
            log.warning("the supervisor cannot be told that the engine %s does not hang: %s", name, error)


async def _end_when_unhealthy(health: Callable[[], str | None]) -> None:
    """Ends the process, to be restarted, once it has been unhealthy for a while: front ends send it nothing any more,
    so it would not recover."""
    since = None
    while True:
        await asyncio.sleep(UNHEALTHY_SECONDS / 4)
        problem, now = health(), asyncio.get_running_loop().time()
        since = None if problem is None else since or now
        if since is not None and now - since >= UNHEALTHY_SECONDS:
            log.critical("the engine ends, to be restarted: %s", problem)
            logging.shutdown()
            os._exit(1)


def _signalled() -> asyncio.Event:
    """Returns an event that SIGTERM sets. SIGINT is ignored: the supervisor handles it."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, event.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    return event
