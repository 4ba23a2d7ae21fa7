"""The engine in the process that needs it: the whole server, or an engine process. It alone imports torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bdh_batch import __version__
from bdh_batch.backends.local import Engine, LocalBackend
from bdh_batch.engine.loading import LoadedEngine, attention_window, load_engine, start_worker
from bdh_batch.engine.worker import Observer
from bdh_batch.messages import NeuronLimit
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.processes.engines import LOADER, EngineInfo
from bdh_batch.settings import Settings
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text.folder import TextComponents

if TYPE_CHECKING:  # as in engines.py
    from bdh_batch.processes.components import Components

LoadEngine = Callable[[Settings, Path], LoadedEngine]
StartEngine = Callable[[Settings, LoadedEngine, Observer], Engine]


class LocalEngine:
    """The engine in this process.

    Args:
        metrics: of the engine.
        observer: is notified of what the engine does.
        show: is called with the engine once it computes.
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
        show: Callable[[Engine], None],
        load: LoadEngine = load_engine,
        start: StartEngine = start_worker,
    ) -> None:
        self._settings = settings
        self._path = path
        self._metrics = metrics
        self._observer = observer
        self._show = show
        self._make = load
        self._start = start

    async def load(self) -> EngineInfo:
        self.engine = engine = await in_daemon_thread(partial(self._make, self._settings, self._path), LOADER)
        self._info = await in_daemon_thread(partial(engine_info, engine, self._settings), LOADER)
        return self._info

    def open(self, components: Components) -> LocalBackend:
        worker = self._start(self._settings, self.engine, self._observer)
        watch_engine(self._metrics, worker, self._info, self._settings)
        self._show(worker)
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
    sizes = (config.vocab_size, config.n_embd, engine.slots, engine.host_slots, window)
    layout = None if engine.states is None else engine.states.layout
    return EngineInfo(*sizes, fingerprint(engine, settings), layout, config.latent_steps)


def fingerprint(engine: LoadedEngine, settings: Settings) -> str:
    """Returns a hash of all that decides which tokens an engine generates: weights, dtypes, kernels, window."""
    digest = hashlib.blake2b(digest_size=16)
    chosen = settings.engine
    device, own = engine.model.weights.embed.device.type, (chosen.kernels, engine.kernels, chosen.state_dtype)
    for part in (__version__, settings.model.attention_window, *own, device, engine.fingerprint):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


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
        engine.model.config.latent_steps,
        NeuronLimit(engine.model.config.n_layer, settings.limits.max_neurons),
    )
