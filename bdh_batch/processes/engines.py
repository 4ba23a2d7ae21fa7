"""What computes a model: an engine in this process, or engines in others."""

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
class Facts:
    """What the front door has to know of a model's engine.

    Args:
        width: of the hidden vectors.
        slots, host_slots: states that the device, and the host's memory, hold.
        window: tokens that a token can look back on; 0 is all.
    """

    vocab_size: int
    width: int
    slots: int
    host_slots: int
    window: int


class Engines(Protocol):
    """What computes one model."""

    compiles_grammars: bool  # whether it does so itself, from what the front door has tried out

    async def load(self) -> Facts:
        """Waits until it can compute. Raises ConfigError, CheckpointError: it never will."""

    def open(self, components: Components) -> Backend:
        """What the front door asks. On the event loop, once it is loaded."""

    @property
    def load_now(self) -> Callable[[], Load] | None:
        """Says how busy it is; None where its own metrics do."""

    async def expositions(self) -> Mapping[str, bytes]:
        """Metrics that are counted in other processes, by their names, as Prometheus reads them."""

    def states(self) -> Sequence[Mapping[str, object]]:
        """Each engine process: pid, model, device, state."""


class LocalEngine:
    """The engine in this process.

    Args:
        load: makes it, off the event loop.
        start: has it compute, on the event loop.
        observer: is told of what it does.
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

    async def load(self) -> Facts:
        self.engine = engine = await in_daemon_thread(partial(self._make, self._settings, self._path), LOADER)
        return facts_of(engine, self._settings)

    def open(self, components: Components) -> LocalBackend:
        self._worker = self._start(self._settings, self.engine, self._observer)
        return local_backend(self._worker, self.engine, components.text, self._settings)

    @property
    def load_now(self) -> Callable[[], Load]:
        return lambda: self._worker.load

    async def expositions(self) -> Mapping[str, bytes]:
        return {}

    def states(self) -> Sequence[Mapping[str, object]]:
        return ()


def facts_of(engine: LoadedEngine, settings: Settings) -> Facts:
    config = engine.model.config
    window = attention_window(settings.model.attention_window, config)
    return Facts(config.vocab_size, config.n_embd, engine.slots, engine.host_slots, window)


def local_backend(worker: Engine, engine: LoadedEngine, text: TextComponents, settings: Settings) -> LocalBackend:
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
