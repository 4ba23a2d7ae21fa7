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
from bdh_batch.engine.worker import Load, Observer
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

    @property
    def current_load(self) -> Callable[[], Load] | None:
        """Returns how many sequences run and wait; None where other processes report that in their own metrics."""

    async def expositions(self) -> Mapping[str, bytes]:
        """Returns the metrics of engine processes in Prometheus' text format, by the processes' names."""

    def states(self) -> Sequence[Mapping[str, object]]:
        """Returns pid, model, device and state of each engine process."""


class LocalEngine:
    """The engine in this process.

    Args:
        observer: is notified of what the engine does.
        load: loads the model and makes the engine, off the event loop.
        start: starts the engine's worker, on the event loop.
    """

    compiles_grammars = False

    def __init__(
        self,
        settings: Settings,
        path: Path,
        observer: Observer,
        load: LoadEngine = load_engine,
        start: StartEngine = start_worker,
    ) -> None:
        self._settings = settings
        self._path = path
        self._observer = observer
        self._make = load
        self._start = start

    async def load(self) -> EngineInfo:
        self.engine = engine = await in_daemon_thread(partial(self._make, self._settings, self._path), LOADER)
        return engine_info(engine, self._settings)

    def open(self, components: Components) -> LocalBackend:
        self._worker = self._start(self._settings, self.engine, self._observer)
        return local_backend(self._worker, self.engine, components.text, self._settings)

    @property
    def current_load(self) -> Callable[[], Load]:
        return lambda: self._worker.load

    async def expositions(self) -> Mapping[str, bytes]:
        return {}

    def states(self) -> Sequence[Mapping[str, object]]:
        return ()


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
