"""A server that accepts connections, from its sockets to their end; when that is, is decided elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, ip_network
from typing import Any, cast

from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from bdh_batch.errors import ConfigError
from bdh_batch.http.auth.caller import UNIX
from bdh_batch.http.transport.accept import Acceptor
from bdh_batch.http.transport.budgets import ConnectionBudget
from bdh_batch.http.transport.listen import bind, listen, local_only, release, url_of
from bdh_batch.http.transport.site import Site
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Server as ServerSettings, Settings

__all__ = ["Server", "bind", "listen", "local_only", "tls_context", "url_of"]

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # for responses that are being written when the server closes


class Server:
    """Connections and their requests, for one application.

    Raises:
        ConfigError: the certificate cannot be used.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._tls = tls_context(settings.server)
        self._proxies = settings.server.trusted_proxies
        self._site = Site(behind_proxies(app, settings.server), settings.limits, metrics)
        self._settings, self._limits, self._metrics = settings.server, settings.limits, metrics
        self._acceptors: list[Acceptor] = []
        self._listeners: Sequence[socket.socket] = ()

    def start(self, listeners: Sequence[socket.socket]) -> None:
        """Takes connections from now on, on the running event loop."""
        budget = ConnectionBudget(self._limits, self._proxies, self._metrics)
        self._listeners = listeners
        self._acceptors = [Acceptor(listener, self._site, budget, self._tls) for listener in listeners]

    async def close(self) -> None:
        """Takes no more connections, lets requests be answered for up to CLOSE_SECONDS, and cuts off the rest."""
        for acceptor in self._acceptors:
            acceptor.close()
        for listener in self._listeners:
            release(listener, self._settings)
        for connection in list(self._site.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._site.empty.wait()
        if self._site.connections:
            log.warning(
                "%d connections did not read their responses in time and are cut off", len(self._site.connections)
            )
        for connection in list(self._site.connections):
            connection.transport.abort()
        for task in self._site.tasks:
            task.cancel()
        if self._site.tasks:
            await asyncio.wait(self._site.tasks, timeout=1)


def behind_proxies(app: ASGIApp, settings: ServerSettings) -> ASGIApp:
    """The application, with the addresses of clients that trusted proxies forward."""
    proxies = settings.trusted_proxies
    if not proxies:
        return app
    return cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, app), [*proxies, *_mapped(proxies)]))


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """What HTTPS needs, or None for HTTP. Raises ConfigError: half of it is missing, or cannot be used."""
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing = "server.tls_key" if key is None else "server.tls_cert"
        raise ConfigError(f"{missing}: a certificate and its key go together, and this is not set")
    for option, file in (("server.tls_cert", cert), ("server.tls_key", key)):
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{option}: {file} cannot be read ({error.strerror})") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # or OpenSSL would ask at the terminal
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"server.tls_cert, server.tls_key: {cert} and {key} do not go together ({error})") from error
    return context


def _mapped(networks: list[str]) -> Iterator[str]:
    """IPv4 networks as sockets of IPv6 see them."""
    for network in (ip_network(text, strict=False) for text in networks if text != UNIX):
        if isinstance(network, IPv4Network):
            yield f"::ffff:{network.network_address}/{96 + network.prefixlen}"
