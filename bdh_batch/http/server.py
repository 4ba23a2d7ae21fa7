"""The socket and uvicorn, set up for a server whose life is decided elsewhere."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from bdh_batch.errors import ConfigError

CLOSE_SECONDS = 5  # for answers that are being written when the server closes
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that it is they who close them
BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn without its own signal handling: draining comes before closing, and a stopped server has not failed."""

    def __init__(self, app: ASGIApp) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and its end are told by ours
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
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


def base_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
