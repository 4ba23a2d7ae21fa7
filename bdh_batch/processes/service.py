"""The life of one server that clients reach, from its socket to its exit.

bind → accept (not ready) → load and warm the models → ready → SIGTERM → drain → close

A process beside which others accept at the same sockets does so itself only once it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bdh_batch.errors import ConfigError
from bdh_batch.http.app import create_app
from bdh_batch.http.auth.keys import KeyRing
from bdh_batch.http.gate import Gate
from bdh_batch.http.responses_api.shared_events import SharedEvents
from bdh_batch.http.responses_api.stored.warming import warm
from bdh_batch.http.serving import Serving
from bdh_batch.http.transport.server import Server, listen, local_only, url_of
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.hosted_models import HostedModels
from bdh_batch.processes.sampling import sample
from bdh_batch.processes.upstreams import with_upstreams
from bdh_batch.settings import Auth, Settings
from bdh_batch.store.recent import Recent

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
        models: makes the models that it serves, from its metrics and its spans.
        name: of the models, for what is counted before a request names one, and for `on_ready`.
        on_ready: is called with the base URL and `name` once requests are accepted.
        listeners: sockets of the supervisor to serve at; without any, the settings say where to listen.
        accepts_early: whether connections are accepted before the models are loaded, so that probes are answered;
            requests get 503 until then. Where another process accepts at the same sockets, that one answers them.
    """

    def __init__(
        self,
        settings: Settings,
        models: Callable[[Metrics, Spans | None], HostedModels],
        name: str,
        on_ready: Callable[[str, str], None] = lambda url, model: None,
        listeners: Sequence[socket.socket] = (),
        accepts_early: bool = True,
    ) -> None:
        self._settings = settings
        self._name = name
        self._on_ready = on_ready
        self._listeners = listeners
        self._accepts_early = accepts_early
        self._gate = Gate()
        self.metrics = Metrics(name, settings.telemetry.vllm_metrics)
        self.recent = Recent(settings.store.recent_requests)
        self.events = SharedEvents()
        self._spans = open_spans(settings, name)
        self._models = with_upstreams(settings, models(self.metrics, self._spans), self.metrics)
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
        serving = Serving.of(self._settings, self._gate, self.metrics, keys, self._spans, self.recent, self.events)
        server = Server(create_app(serving, local_only(listeners)), self._settings, self.metrics)
        self._grpc = open_grpc(serving)
        self._serving = serving
        watching = [asyncio.create_task(serving.records.watch()), asyncio.create_task(sample(serving))]
        if keys is not None:
            watching.append(asyncio.create_task(keys.watch()))
        try:
            await self._serve(server, listeners)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(server.close(), *([] if self._grpc is None else [self._grpc.close()]))
            await serving.close()
            if self._spans is not None:
                await self._spans.close()

    async def _serve(self, server: Server, listeners: Sequence[socket.socket]) -> None:
        try:
            if self._accepts_early:
                await self._accept(server, listeners)
            loading = asyncio.ensure_future(self._models.load())
            stopped = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                loading.cancel()
                return  # no request was accepted yet
            self._gate.open(loading.result())
            gc.collect()
            gc.freeze()  # what is alive now stays: the collector need not walk it again
            if not self._accepts_early:
                await self._accept(server, listeners)
            self._on_ready(url_of(listeners, self._settings.server), self._name)
            warming = asyncio.create_task(warm(self._serving))
            try:
                await stopped
            finally:
                warming.cancel()
            self._gate.drain()
            self._serving.feed.close()
            if self._grpc is not None:
                self._grpc.drain()
            log.info("draining for up to %.0f s", self._settings.server.drain_seconds)
            await self._models.drain(self._settings.server.drain_seconds)
        finally:
            await self._models.close()

    async def _accept(self, server: Server, listeners: Sequence[socket.socket]) -> None:
        """Takes connections from now on. Raises ConfigError: there is no port for gRPC."""
        server.start(listeners)
        if self._grpc is not None:
            await self._grpc.start()


async def run_until_signal(service: Service) -> None:
    """Runs `service` until SIGTERM or SIGINT; a second one does not wait for the drain. SIGHUP begins it, too."""
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(service.run())

    def on_signal() -> None:
        if service.stopping:
            running.cancel()
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` has it ignored
        loop.add_signal_handler(signal.SIGHUP, service.stop)
    with contextlib.suppress(asyncio.CancelledError):
        await running
