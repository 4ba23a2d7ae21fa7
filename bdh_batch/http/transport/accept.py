"""Takes new connections from a listening socket, within the budget, also where file descriptors run out."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import cast

from bdh_batch.errors import RetryLater
from bdh_batch.http.transport.budgets import ConnectionBudget, Occasionally
from bdh_batch.http.transport.connection import LINGER_SECONDS, Connection
from bdh_batch.http.transport.exchange import refusal
from bdh_batch.http.transport.site import Site

log = logging.getLogger(__name__)

AT_ONCE = 64  # connections that are taken before others have their turn
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE_SECONDS = 0.5  # where there is no descriptor for one more; clients wait in the kernel's backlog meanwhile
MOST_REFUSALS = 128  # of clients that get an error; beyond, connections are closed without a word


class Acceptor:
    """One listening socket's connections, each of which becomes a `Connection`."""

    def __init__(
        self, listener: socket.socket, site: Site, budget: ConnectionBudget, tls: ssl.SSLContext | None
    ) -> None:
        self._listener = listener
        self._site = site
        self._budget = budget
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._refusals = 0
        self._warnings = Occasionally()
        self._start()

    def close(self) -> None:
        """Takes no more connections. Those that are open stay."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listener)
        for opening in self._opening:
            opening.cancel()

    def _start(self) -> None:
        self._again = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                taken, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                self._warnings.warn(
                    "no connection can be taken (%s); raise ulimit -n or lower limits.max_connections", error.strerror
                )
                self._loop.remove_reader(self._listener)
                self._again = self._loop.call_later(PAUSE_SECONDS, self._start)
                return
            taken.setblocking(False)
            if taken.family != socket.AF_UNIX:
                taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._take(taken, peer[0] if isinstance(peer, tuple) else "")

    def _take(self, taken: socket.socket, address: str) -> None:
        try:
            leave = self._budget.enter(address)
        except RetryLater as error:
            self._refuse(taken, error)
            return
        ended = Once(leave)
        self._begin(taken, lambda: Connection(self._site, ended), ended)

    def _begin(self, taken: socket.socket, protocol: Callable[[], asyncio.Protocol], ended: Callable[[], None]) -> None:
        task = self._loop.create_task(self._open(taken, protocol, ended))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(
        self, taken: socket.socket, protocol: Callable[[], asyncio.Protocol], ended: Callable[[], None]
    ) -> None:
        patience = None if self._tls is None else self._site.limits.header_seconds
        try:
            await self._loop.connect_accepted_socket(protocol, taken, ssl=self._tls, ssl_handshake_timeout=patience)
        except OSError as error:  # what came was no TLS, or it did not come in time, or the client had left
            log.debug("a connection was not opened: %s", error)
            ended()
        except BaseException:
            ended()
            raise

    def _refuse(self, taken: socket.socket, error: RetryLater) -> None:
        if self._tls is not None or self._refusals == MOST_REFUSALS:
            taken.close()
            return
        self._refusals += 1
        response, ended = refusal(error, self._site.metrics), Once(self._refused)
        self._begin(taken, lambda: Refusal(response, ended), ended)

    def _refused(self) -> None:
        self._refusals -= 1


class Refusal(asyncio.Protocol):
    """Says one thing, and throws away for a moment what comes: a reset would take the word from the client."""

    def __init__(self, response: bytes, ended: Callable[[], None]) -> None:
        self._response = response
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        transport.write(self._response)
        transport.write_eof()
        self._timer = asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._ended()


class Once:
    """Calls `function` the first time that it is called."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        if self._function is not None:
            function, self._function = self._function, None
            function()
