"""An engine that is loaded to compute for front ends, wherever these connect to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bdh_batch import __version__
from bdh_batch.backends.engine_port import EnginePort
from bdh_batch.backends.local import LocalBackend
from bdh_batch.backends.recorder import StepRecorder
from bdh_batch.backends.wire import Welcome
from bdh_batch.engine.loading import LoadedEngine, load_engine, start_worker
from bdh_batch.engine.worker import Load
from bdh_batch.errors import NotEnoughMemory
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.observability.metrics import exposition, process_registry
from bdh_batch.observability.watched import Watched
from bdh_batch.processes.engines import LOADER, EngineInfo
from bdh_batch.processes.local_engine import LoadEngine, engine_info, local_backend, watch_engine
from bdh_batch.processes.model_settings import ModelSettings, chosen_model
from bdh_batch.registry.locate import Located
from bdh_batch.settings import Settings
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text.folder import TextComponents, load_text
from bdh_batch.text.grammar import Grammars
from bdh_batch.text.vocabulary import Vocabulary, vocabulary_of

HEARTBEATS = 4  # within the time after which a front end takes an engine for lost
LONGEST_INTERVAL = 1.0  # seconds between two of them


class ServedEngine:
    """A loaded engine, until it is closed.

    Args:
        port: at which front ends connect.
        exposition: returns its metrics.
        load: returns its load.
        watched: what operators can ask of it.
    """

    def __init__(
        self,
        port: EnginePort,
        backend: LocalBackend,
        located: Located,
        exposition: Callable[[], bytes],
        load: Callable[[], Load],
        watched: Watched,
    ) -> None:
        self.port = port
        self.backend = backend
        self.exposition = exposition
        self.load = load
        self.watched = watched
        self._located = located

    @classmethod
    async def open(
        cls, model: ModelSettings, secret: str, record: Path, load: LoadEngine = load_engine
    ) -> ServedEngine:
        """Loads a model and starts its engine.

        Args:
            secret: what front ends have to send to be let in.
            record: the file in which it records its steps.
            load: makes the engine, off the event loop.

        Raises:
            ConfigError, CheckpointError: it cannot start.
        """
        settings, located = model.settings, chosen_model(model.settings)
        engine, text, vocabulary = await in_daemon_thread(partial(_load, settings, located.path, load), LOADER)
        facts, registry = await in_daemon_thread(partial(engine_info, engine, settings), LOADER), process_registry()
        metrics = EngineMetrics(registry, model.name)
        worker = start_worker(settings, engine, metrics, StepRecorder(record))
        watch_engine(metrics, worker, facts, settings)
        backend = local_backend(worker, engine, text, settings)
        grammars = Grammars(vocabulary, None, cache_bytes=settings.structured_output.cache_memory)
        interval = min(LONGEST_INTERVAL, settings.engine.heartbeat_seconds / HEARTBEATS)
        welcome = _welcome(model.name, str(engine.model.weights.embed.device), facts)
        port = EnginePort(backend, grammars, welcome, secret, interval, lambda: worker.load)
        watched = Watched(registry)
        watched.add_engine(model.name, worker)
        return cls(port, backend, located, partial(exposition, registry), lambda: worker.load, watched)

    async def leave(self, seconds: float) -> None:
        """Has front ends move their streams to other engines, and waits so long for that, or for their end."""
        self.port.leave()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.port.idle.wait(), seconds)

    async def close(self) -> None:
        """Disconnects front ends and ends the engine. To be called once."""
        self.port.close()
        await asyncio.to_thread(self.backend.close)
        self._located.close()


def _welcome(name: str, device: str, facts: EngineInfo) -> Welcome:
    return Welcome(
        version=__version__,
        pid=os.getpid(),
        model=name,
        device=device,
        fingerprint=facts.fingerprint,
        vocab_size=facts.vocab_size,
        width=facts.width,
        slots=facts.slots,
        host_slots=facts.host_slots,
        window=facts.window,
        layout=facts.layout,
        latent_steps=facts.latent_steps,
    )


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
