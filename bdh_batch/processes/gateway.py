"""A front door without an engine: all its models are upstreams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from bdh_batch.errors import ConfigError
from bdh_batch.http.app import create_app
from bdh_batch.http.gate import Gate
from bdh_batch.http.serving import Serving
from bdh_batch.http.transport.server import Server, listen, local_only, url_of
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.engines import LOADER
from bdh_batch.processes.service import key_ring, open_grpc, open_spans
from bdh_batch.processes.upstreams import Upstreams
from bdh_batch.settings import Settings
from bdh_batch.system.threads import in_daemon_thread

log = logging.getLogger(__name__)


class Gateway:
    """One gateway, from its socket to its exit.

    Args:
        on_ready: is called with the base URL and the first model's name once requests are accepted.

    Raises:
        ConfigError: the settings have no upstreams, or more processes than one.
    """

    def __init__(self, settings: Settings, on_ready: Callable[[str, str], None] = lambda url, model: None) -> None:
        if not settings.upstreams:
            raise ConfigError("upstreams: a gateway needs some")
        if settings.server.workers > 1 or settings.engine.replicas is not None:
            raise ConfigError("server.workers, engine.replicas: a gateway is one process, without engines")
        self._settings = settings
        self._on_ready = on_ready
        self._name = settings.upstreams[0].id
        self._gate = Gate()
        self._metrics = Metrics(self._name)
        self._spans = open_spans(settings, self._name)
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
            ConfigError: the gateway could not start.
        """
        settings = self._settings
        keys = key_ring(settings.auth)
        listeners = listen(settings.server)
        serving = Serving.of(settings, self._gate, self._metrics, keys, self._spans)
        server = Server(create_app(serving, local_only(listeners)), settings, self._metrics)
        grpc = open_grpc(serving)
        server.start(listeners)
        watching = None if keys is None else asyncio.create_task(keys.watch())
        try:
            if grpc is not None:
                await grpc.start()
            upstreams = await in_daemon_thread(partial(Upstreams.open, settings, self._metrics), LOADER)
            try:
                upstreams.start()
                self._gate.open(*upstreams.models)
                self._on_ready(url_of(listeners, settings.server), self._name)
                await self._stop.wait()
                self._gate.drain()
                if grpc is not None:
                    grpc.drain()
                log.info("draining for up to %.0f s", settings.server.drain_seconds)
                await upstreams.drain(settings.server.drain_seconds)
            finally:
                upstreams.close()
        finally:
            if watching is not None:
                watching.cancel()
            await asyncio.gather(server.close(), *([] if grpc is None else [grpc.close()]))
            if self._spans is not None:
                await self._spans.close()
