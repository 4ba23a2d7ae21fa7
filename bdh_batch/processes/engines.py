"""The engines that compute a model for a front end: one in this process, or several in others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from bdh_batch.backends.base import Backend
from bdh_batch.backends.local import Engine, LocalBackend
from bdh_batch.engine.loading import LoadedEngine, attention_window, load_engine, start_worker
from bdh_batch.engine.worker import Observer
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.processes.components import Components
from bdh_batch.settings import Settings
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text.folder import TextComponents

LOADER = "bdh-loader"  # the name of the threads that load

LoadEngine = Callable[[Settings, Path], LoadedEngine]
StartEngine = Callable[[Settings, LoadedEngine, Observer], Engine]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The sizes of a model's engine that a front end has to know.

    Args:
        width: of the hidden vectors.
        slots, host_slots: how many states fit the device, and the host's memory.
        window: how many tokens before it a token attends to; 0 is all.
    """

    vocab_size: int
    width: int
    slots: int
    host_slots: int
    window: int


class Engines(Protocol):
    """The engines that compute one model."""

    compiles_grammars: bool  # whether grammars are compiled there again, after the front end's sandbox

    async def load(self) -> EngineInfo:
        """Waits until an engine can compute. Raises ConfigError, CheckpointError where the model cannot be loaded."""

    def open(self, components: Components) -> Backend:
        """Returns the backend of the engines. To be called on the event loop, after `load`."""

    def states(self) -> Sequence[Mapping[str, object]]:
        """Returns pid, model, device and state of each engine process."""

    def close(self) -> None:
        """Disconnects from engine processes. Idempotent."""


class LocalEngine:
    """The engine in this process.

    Args:
        metrics: of the engine.
        observer: is notified of what the engine does.
        load: loads the model and makes the engine, off the event loop.
        start: starts the engine's worker, on the event loop.
    """

    compiles_grammars = False

    def __init__(
        self,
        settings: Settings,
        path: Path,
        metrics: EngineMetrics,
        observer: Observer,
        load: LoadEngine = load_engine,
        start: StartEngine = start_worker,
    ) -> None:
        self._settings = settings
        self._path = path
        self._metrics = metrics
        self._observer = observer
        self._make = load
        self._start = start

    async def load(self) -> EngineInfo:
        self.engine = engine = await in_daemon_thread(partial(self._make, self._settings, self._path), LOADER)
        return engine_info(engine, self._settings)

    def open(self, components: Components) -> LocalBackend:
        worker = self._start(self._settings, self.engine, self._observer)
        watch_engine(self._metrics, worker, engine_info(self.engine, self._settings), self._settings)
        return local_backend(worker, self.engine, components.text, self._settings)

    def states(self) -> Sequence[Mapping[str, object]]:
        return ()

    def close(self) -> None:
        """There is no process to disconnect from."""


def watch_engine(metrics: EngineMetrics, worker: Engine, info: EngineInfo, settings: Settings) -> None:
    """Has the metrics report an engine's sizes, and its load at the moment of a scrape."""
    metrics.watch(lambda: worker.load)
    metrics.describe_cache(
        num_gpu_blocks=info.slots,  # states on the device, which without a GPU is main memory
        num_cpu_blocks=info.host_slots,
        block_size=settings.model.max_model_len,  # tokens that a state can stand for
        cache_dtype=settings.engine.state_dtype,
        enable_prefix_caching=settings.prefix_cache.enabled,
        sliding_window=info.window or None,
    )


def engine_info(engine: LoadedEngine, settings: Settings) -> EngineInfo:
    """Returns the sizes of a loaded engine."""
    config = engine.model.config
    window = attention_window(settings.model.attention_window, config)
    return EngineInfo(config.vocab_size, config.n_embd, engine.slots, engine.host_slots, window)


def local_backend(worker: Engine, engine: LoadedEngine, text: TextComponents, settings: Settings) -> LocalBackend:
    """Returns the backend of an engine in this process."""
    return LocalBackend(
        worker,
        text.tokenizer,
        engine.model.config.vocab_size,
        settings.model.max_model_len,
        settings.health.stall_seconds,
        settings.scheduler.queue_timeout,
        settings.scheduler.request_timeout,
        text.eos,
    )
