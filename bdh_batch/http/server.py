"""The socket and uvicorn, set up for a server whose life is decided elsewhere."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from ipaddress import IPv4Network, ip_network

import uvicorn
from starlette.types import ASGIApp

from bdh_batch.errors import ConfigError
from bdh_batch.http.connection import connection_type
from bdh_batch.settings import Server as ServerSettings, Settings
from bdh_batch.telemetry import Metrics

CLOSE_SECONDS = 5  # for answers that are being written when the server closes
BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn without its own signal handling: draining comes before closing, and a stopped server has not failed.

    Raises:
        ConfigError: the certificate cannot be used.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        # Its start and its end are told by ours, and whoever sends nonsense cannot fill the log.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        tls = tls_context(settings.server)
        proxies = settings.server.trusted_proxies
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=connection_type(settings.limits, metrics),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                proxy_headers=bool(proxies),
                forwarded_allow_ips=[*proxies, *_mapped(proxies)],
                ssl_context_factory=None if tls is None else lambda config, default: tls,
                timeout_keep_alive=settings.limits.keep_alive_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, whose address is taken before the slow part of the start.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)  # until one listens, Linux lets others bind the same address
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"server.port: cannot listen on {host}:{port} ({error.strerror or error})") from error
    listener.setblocking(False)
    return listener


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
    for network in (ip_network(text, strict=False) for text in networks):
        if isinstance(network, IPv4Network):
            yield f"::ffff:{network.network_address}/{96 + network.prefixlen}"


def base_url(listener: socket.socket, tls: bool = False) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
