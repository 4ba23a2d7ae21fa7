"""A connection, as uvicorn's httptools protocol has it, with bounds on what a client may send before it has asked for
anything, and OpenAI's error body where what it sends is not HTTP.

What a request's body may be, and how long it may take, is the middleware's business.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar
from uuid import uuid4

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bdh_batch.errors import BDHError
from bdh_batch.http.errors import HeadersTooLarge, HeaderTimeout, InvalidHTTP, error_response
from bdh_batch.settings import Limits
from bdh_batch.telemetry import Metrics

LINGER_SECONDS = 3.0  # in which what a client still sends is thrown away, so that it reads why


def connection_type(limits: Limits, metrics: Metrics) -> type[Connection]:
    """uvicorn makes the connections itself, of this type."""
    return type("LimitedConnection", (Connection,), {"_limits": limits, "_metrics": metrics})


class Connection(HttpToolsProtocol):
    _limits: ClassVar[Limits]
    _metrics: ClassVar[Metrics]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = True  # what comes next belongs to a request line or to headers
        self._unseen = 0  # bytes since the parser last made anything of them
        self._error: BDHError | None = None  # found by a callback of the parser
        self._over = False
        self._timer: asyncio.TimerHandle | None = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._unseen += len(data)
        super().data_received(data)
        if self._over or self.transport.is_closing():
            return
        if self._unseen > self._limits.max_header_bytes:  # a head without end, or trailers, or chunks of nothing
            self._refuse(self._too_large())
        elif self._in_head and self._idle and self._timer is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # headers after a body are nobody's: they must not pass for the request's own
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head, self._unseen = False, 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.max_header_bytes:
            self._error = self._too_large()
            raise self._error  # ends up in `send_400_response`
        super().on_headers_complete()
        if self.parser.should_upgrade():  # the parser reads no further, whatever is answered
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unseen = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._unseen = True, 0
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and not self.pipeline and not self.transport.is_closing():
            # Answered before its body was read. Whatever else comes of that is thrown away, but not for ever.
            self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._error or InvalidHTTP("What came is not valid HTTP."))

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing to warn of: a request that wishes for another protocol is answered in this one."""

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(self._limits.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._unseen:
            seconds = self._limits.header_seconds
            self._refuse(HeaderTimeout(f"Headers should be there within {seconds:g} seconds (limits.header_seconds)."))
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_large(self) -> HeadersTooLarge:
        most = self._limits.max_header_bytes
        return HeadersTooLarge(f"A request's headers may have {most} bytes here (limits.max_header_bytes).")

    def _refuse(self, error: BDHError) -> None:
        """The last thing that is said on this connection."""
        self._stop_timer()
        self._over = True
        in_body = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (in_body and (self.cycle.response_started or not self.cycle.more_body)):
            self.transport.close()  # another request is being answered, and that is not an answer to it
            return
        if in_body:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._write(error_response(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def _write(self, response: Response) -> None:
        self._metrics.refused_unread(response.status_code)
        headers = [*response.raw_headers, (b"x-request-id", uuid4().hex.encode()), (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        self.transport.write(STATUS_LINE[response.status_code] + lines + b"\r\n" + bytes(response.body))
