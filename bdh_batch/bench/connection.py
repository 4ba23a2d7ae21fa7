"""HTTP/1.1 connections that are kept and used again. The moment of each read is noted before anything else is done."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from bdh_batch.bench.outcome import Failed
from bdh_batch.errors import ConfigError

CROSSING_SECONDS = 0.05  # longer, and a close had not been under way when the request was sent


class ResponseReader(Protocol):
    """Reads a response as it comes; must not raise, but may say that it has seen enough."""

    sent: float  # when the request first went to a socket; 0 until then
    failure: Failed | None

    def begin(self, status: int, content_type: str) -> None: ...

    def take(self, body: bytes, now: float) -> None: ...


@dataclass(frozen=True)
class Address:
    """Where a server is: `path` goes before every endpoint's."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, url: str, insecure: bool) -> Address:
        """Raises ConfigError where `url` is not one of a server."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").encode("idna").decode()
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"--base-url {url}: {error}") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ConfigError(f"--base-url {url}: should be as in http://127.0.0.1:8000")
        if any(character <= " " or character == "\x7f" for character in url):
            raise ConfigError(f"--base-url {url!r}: has a space or a control character")
        return cls(host, port, parts.path.rstrip("/"), _tls(insecure) if parts.scheme == "https" else None)

    def request(self, method: str, path: str, headers: dict[str, str], content: bytes) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"host": f"{host}:{self.port}", **headers}
        lines = [f"{method} {self.path}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content


def _tls(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._reader: ResponseReader | None = None
        self._end: asyncio.Future[None] | None = None
        self.usable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def send(self, request: bytes, reader: ResponseReader) -> asyncio.Future[None]:
        """The future ends when the response is whole; raises Failed where it never will be."""
        self._reader, self._end = reader, asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._type, self._bounded, self._begun, self.responded = "", False, False, False
        self.sent = time.perf_counter()
        reader.sent = reader.sent or self.sent
        self._transport.write(request)
        return self._end

    def close(self) -> None:
        self.usable, self._reader, self._end = False, None, None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        reader = self._reader
        if reader is None:  # no request was sent: the next response could not be found
            self.close()
            return
        self.responded = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(Failed("malformed_http", str(error)))
        if reader.failure is not None:
            self._fail(reader.failure)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._type = value.decode("latin-1")
        self._bounded |= name in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._reader is not None and status >= 200:  # an interim response only announces the one that will come
            self._begun = True
            self._reader.begin(status, self._type)

    def on_body(self, body: bytes) -> None:
        if self._reader is not None:
            self._reader.take(body, self._now)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self.usable = self.usable and self._parser.should_keep_alive()
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._end is None:
            return
        if not self.responded:
            self._fail(Failed("closed_before_answer", "the server closed the connection before it responded"))
        elif self._begun and self._type and not self._bounded and error is None:  # the close is the response's end
            self._finish()
        else:
            self._fail(Failed("closed_mid_stream", "the server closed the connection inside its response"))

    def _finish(self) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_result(None)
        self._reader = self._end = None

    def _fail(self, failed: Failed) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(failed)
        self.close()


class Pool:
    """Connections to one server; as many as there are requests under way."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, reader: ResponseReader) -> None:
        """Sends and waits for the whole response.

        A kept connection that closes without a byte within CROSSING_SECONDS of the send is taken for one that the
        server had given up before it could read the request, which goes, once, over a new one; its time counts from the
        first send. A close that comes later, or over a new connection, is a failure.

        Raises Failed.
        """
        if kept := self._kept():
            try:
                await self._over(kept, request, reader)
                return
            except Failed as failed:
                held = time.perf_counter() - kept.sent
                if failed.kind != "closed_before_answer" or held > CROSSING_SECONDS:
                    raise
        await self._over(await self._connect(), request, reader)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _kept(self) -> Connection | None:
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
        return None

    async def _over(self, connection: Connection, request: bytes, reader: ResponseReader) -> None:
        whole = False
        try:
            await connection.send(request, reader)
            whole = True
        finally:
            if whole and connection.usable:
                self._idle.append(connection)
            else:
                connection.close()

    async def _connect(self) -> Connection:
        to = self._address
        try:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, to.host, to.port, ssl=to.tls)
        except ConnectionRefusedError as error:
            raise Failed("connect_refused", str(error)) from None
        except OSError as error:
            raise Failed("connect_failed", str(error)) from None
        return connection
