"""The life of one server that clients reach, from its socket to its exit.

bind → listen (not ready) → load and warm the model → ready → SIGTERM → drain → close
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bdh_batch import __version__
from bdh_batch.backends.base import Backend
from bdh_batch.engine.worker import Observer
from bdh_batch.errors import ConfigError
from bdh_batch.http.app import create_app
from bdh_batch.http.auth.keys import KeyRing
from bdh_batch.http.gate import Gate, ServedModel
from bdh_batch.http.serving import Serving
from bdh_batch.http.transport.server import Server, listen, local_only, url_of
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.chosen_model import chosen_model, model_name
from bdh_batch.processes.components import Components, ModelFolder
from bdh_batch.processes.engines import LOADER, EngineInfo, Engines
from bdh_batch.processes.upstreams import Upstreams
from bdh_batch.settings import Auth, Settings
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text.grammar import Grammars

if TYPE_CHECKING:
    from bdh_batch.kserve.server import KServeServer
    from bdh_batch.observability.spans import Spans

log = logging.getLogger(__name__)


def key_ring(auth: Auth) -> KeyRing | None:
    """Returns the API keys, or None where access needs none.

    Raises:
        ConfigError: there are no keys, or metrics or docs are protected and access needs none.
    """
    if auth.enabled:
        return KeyRing([key.get_secret_value() for key in auth.api_keys], auth.api_keys_file)
    for option in ("protect_metrics", "protect_docs"):
        if getattr(auth, option):
            raise ConfigError(f"auth.{option}: there are no keys to ask for unless auth.enabled is set")
    return None


def open_spans(settings: Settings, model_name: str) -> Spans | None:
    """Returns what exports spans, or None where no collector is set.

    Raises:
        ConfigError: OpenTelemetry is not installed, or cannot be set up.
    """
    endpoint = settings.telemetry.otlp_endpoint
    if endpoint is None:
        return None
    try:
        from bdh_batch.observability.spans import Spans  # an extra: needed only where spans are exported
    except ImportError as error:
        text = f"OpenTelemetry is not installed ({error}); pip install 'bdh-batch[otel]'"
        raise ConfigError(f"telemetry.otlp_endpoint: {text}") from error
    return Spans(str(endpoint), model_name)


def open_grpc(serving: Serving) -> KServeServer | None:
    """Returns the gRPC server, or None where no port is set for one.

    Raises:
        ConfigError: gRPC is not installed.
    """
    if serving.settings.kserve.grpc_port is None:
        return None
    try:
        from bdh_batch.kserve.server import KServeServer  # an extra: needed only where there is gRPC
    except ImportError as error:
        text = f"gRPC is not installed ({error}); pip install 'bdh-batch[kserve]'"
        raise ConfigError(f"kserve.grpc_port: {text}") from error
    return KServeServer(serving)


class Service:
    """One server, from its socket to its exit.

    Args:
        engines: makes the engines, from the settings, the model's path, and the observer of what they do.
        on_ready: is called with the base URL and the model's name once requests are accepted.
        listeners: sockets of the supervisor to serve at; without any, the settings say where to listen.
    """

    def __init__(
        self,
        settings: Settings,
        engines: Callable[[Settings, Path, Observer], Engines],
        on_ready: Callable[[str, str], None] = lambda url, model: None,
        listeners: Sequence[socket.socket] = (),
    ) -> None:
        self._settings = settings
        self._on_ready = on_ready
        self._listeners = listeners
        self._model = chosen_model(settings)
        self._path = self._model.path
        self._name = model_name(settings, self._model)
        self._gate = Gate()
        self.metrics = Metrics(self._name)
        self._spans = open_spans(settings, self._name)
        observer = self.metrics if self._spans is None else self._spans.beside(self.metrics)
        self._engines = engines(settings, self._path, observer)
        self._stop = asyncio.Event()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Begins the drain."""
        self._stop.set()

    async def run(self) -> None:
        """Serves until `stop`.

        Raises:
            ConfigError, CheckpointError: the server could not start.
        """
        keys = key_ring(self._settings.auth)
        listeners = [*self._listeners] or listen(self._settings.server)
        serving = Serving.of(self._settings, self._gate, self.metrics, keys, self._spans)
        server = Server(create_app(serving, local_only(listeners)), self._settings, self.metrics)
        self._grpc = open_grpc(serving)
        server.start(listeners)
        watching = None if keys is None else asyncio.create_task(keys.watch())
        try:
            if self._grpc is not None:
                await self._grpc.start()
            await self._serve(url_of(listeners, self._settings.server))
        finally:
            if watching is not None:
                watching.cancel()
            await asyncio.gather(server.close(), *([] if self._grpc is None else [self._grpc.close()]))
            if self._spans is not None:
                await self._spans.close()
            self._model.close()

    async def _serve(self, url: str) -> None:
        loading = asyncio.ensure_future(self._load())
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return  # no request was accepted yet
        components, facts = loading.result()
        backend = self._engines.open(components)
        upstreams = await in_daemon_thread(partial(Upstreams.open, self._settings, self.metrics), LOADER)
        try:
            upstreams.start()
            self._open(backend, components, facts, upstreams)
            self._on_ready(url, self._name)
            await stopped
            self._gate.drain()
            if self._grpc is not None:
                self._grpc.drain()
            log.info("draining for up to %.0f s", self._settings.server.drain_seconds)
            seconds = self._settings.server.drain_seconds
            await asyncio.gather(backend.drain(seconds), upstreams.drain(seconds))
        finally:
            components.close()
            upstreams.close()
            await asyncio.to_thread(backend.close)

    async def _load(self) -> tuple[Components, EngineInfo]:
        opened = await in_daemon_thread(partial(ModelFolder.of, self._settings, self._path), LOADER)
        try:
            facts = await self._engines.load()
            return await in_daemon_thread(partial(opened.fit, facts.vocab_size), LOADER), facts
        except BaseException:
            opened.close()
            raise

    def _open(self, backend: Backend, components: Components, facts: EngineInfo, upstreams: Upstreams) -> None:
        settings, text = self._settings, components.text
        self._watch(components, facts)
        if components.grammars is not None:
            components.grammars.warm_up()
        gc.collect()
        gc.freeze()  # what is alive now stays: the collector need not walk it again
        self._gate.open(
            ServedModel(
                backend=backend,
                name=self._name,
                aliases=tuple(settings.model.aliases),
                created=int(self._path.stat().st_mtime),
                fingerprint=f"{self._name}-bdh_batch-{__version__}",
                max_model_len=settings.model.max_model_len,
                defaults=components.defaults,
                template=components.template,
                width=facts.width,
                tokenizer_info=text.info() | {"vocab_size": facts.vocab_size},
                grammars=Grammars(
                    components.vocabulary,
                    components.grammars,
                    settings.limits.max_schema_bytes,
                    settings.structured_output.cache_memory,
                    elsewhere=self._engines.compiles_grammars,
                ),
                engines=self._engines.states,
            ),
            *upstreams.models,
        )

    def _watch(self, components: Components, facts: EngineInfo) -> None:
        """Has the metrics report what is read at the moment of a scrape: load, sizes, sandboxes."""
        settings, metrics = self._settings, self.metrics
        if (load := self._engines.current_load) is not None:
            metrics.watch(load)
        metrics.describe_cache(
            num_gpu_blocks=facts.slots,  # states on the device, which without a GPU is main memory
            num_cpu_blocks=facts.host_slots,
            block_size=settings.model.max_model_len,  # tokens that a state can stand for
            cache_dtype=settings.engine.state_dtype,
            enable_prefix_caching=settings.prefix_cache.enabled,
            sliding_window=facts.window or None,
        )
        sandboxes = {"templates": components.templates, "grammars": components.grammars}
        metrics.watch_sandboxes(
            {work: partial(getattr, sandbox, "load") for work, sandbox in sandboxes.items() if sandbox is not None}
        )


class Runs(Protocol):
    """A server that runs until it is told to stop."""

    @property
    def stopping(self) -> bool:
        """Whether it drains."""

    def stop(self) -> None:
        """Begins the drain."""

    async def run(self) -> None:
        """Serves until `stop`."""


async def run_until_signal(service: Runs) -> None:
    """Runs `service` until SIGTERM or SIGINT; a second signal does not wait for the drain."""
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(service.run())

    def on_signal() -> None:
        if service.stopping:
            running.cancel()
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    with contextlib.suppress(asyncio.CancelledError):
        await running
