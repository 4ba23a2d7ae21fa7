"""An engine process: loads the model, and serves front ends at a Unix socket until SIGTERM.

It serves no HTTP and runs no templates; no client can reach it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bdh_batch import __version__
from bdh_batch.backends.engine_port import EnginePort
from bdh_batch.backends.recorder import StepRecorder
from bdh_batch.backends.wire import Welcome
from bdh_batch.engine.loading import LoadedEngine, load_engine, start_worker
from bdh_batch.errors import NotEnoughMemory
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.observability.metrics import exposition, process_registry
from bdh_batch.observability.watched import Watched
from bdh_batch.processes.engines import LOADER
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.local_engine import LoadEngine, engine_info, local_backend, watch_engine
from bdh_batch.processes.metrics_socket import report
from bdh_batch.processes.model_settings import ModelSettings, chosen_model
from bdh_batch.processes.watch_socket import show
from bdh_batch.settings import Settings
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text.folder import TextComponents, load_text
from bdh_batch.text.grammar import Grammars
from bdh_batch.text.vocabulary import Vocabulary, vocabulary_of

log = logging.getLogger(__name__)

HEARTBEATS = 4  # within the time after which a front end takes an engine for lost
UNHEALTHY_SECONDS = 2.0  # in which front ends move the streams
LONGEST_INTERVAL = 1.0  # seconds between two of them


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
    settings = model.settings
    leaving, located = _signalled(), chosen_model(settings)
    engine, text, vocabulary = await in_daemon_thread(partial(_load, settings, located.path, load), LOADER)
    facts, registry = await in_daemon_thread(partial(engine_info, engine, settings), LOADER), process_registry()
    metrics = EngineMetrics(registry, model.name)
    worker = start_worker(settings, engine, metrics, StepRecorder(folder.step(name)))
    watch_engine(metrics, worker, facts, settings)
    backend = local_backend(worker, engine, text, settings)
    grammars = Grammars(vocabulary, None, cache_bytes=settings.structured_output.cache_memory)
    welcome = Welcome(
        version=__version__,
        pid=os.getpid(),
        model=model.name,
        device=str(engine.model.weights.embed.device),
        fingerprint=facts.fingerprint,
        vocab_size=facts.vocab_size,
        width=facts.width,
        slots=facts.slots,
        host_slots=facts.host_slots,
        window=facts.window,
        layout=facts.layout,
        latent_steps=facts.latent_steps,
    )
    folder.agree(welcome.fingerprint)
    interval = min(LONGEST_INTERVAL, settings.engine.heartbeat_seconds / HEARTBEATS)
    port = EnginePort(backend, grammars, welcome, folder.secret, interval, lambda: worker.load)
    server = await asyncio.get_running_loop().create_unix_server(port.new_connection, sock=folder.listen(name))
    for path in (folder.metrics(name), folder.watch(name)):
        path.unlink(missing_ok=True)
    reporting = await report(partial(exposition, registry), folder.metrics(name))
    watched = Watched(registry)
    watched.add_engine(model.name, worker)
    showing = await show(watched, folder.watch(name))
    watching = asyncio.create_task(_end_when_unhealthy(backend.health))
    try:
        on_ready()
        await leaving.wait()
        watching.cancel()
        await _leave(port, settings.server.drain_seconds)
    finally:
        server.close()
        reporting.close()
        showing.close()
        port.close()
        await asyncio.to_thread(backend.close)
        located.close()


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


def _load(settings: Settings, path: Path, load: LoadEngine) -> tuple[LoadedEngine, TextComponents, Vocabulary | str]:
    folder = path if path.is_dir() else path.parent
    text = load_text(folder, settings.chat.template, settings.chat.parse_special_tokens)
    try:
        engine = load(settings, path)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise NotEnoughMemory(f"there is not enough memory for the model at {path}") from error
    size = engine.model.config.vocab_size
    text = text.fit(size)
    return engine, text, vocabulary_of(text.tokenizer, size, text.eos)


async def _leave(port: EnginePort, seconds: float) -> None:
    """Has front ends move their streams to other engines, and waits for that, or for their end."""
    port.leave()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(port.idle.wait(), seconds)


def _signalled() -> asyncio.Event:
    """Returns an event that SIGTERM sets. SIGINT is ignored: the supervisor handles it."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, event.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    return event
