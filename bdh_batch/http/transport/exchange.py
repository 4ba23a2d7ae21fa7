"""One request and its response: ASGI's messages on the application's side, bytes on the connection's."""

from __future__ import annotations

import asyncio
import http
import logging
import re
import time
from email.utils import formatdate
from functools import lru_cache
from typing import Protocol
from uuid import uuid4

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Scope

from bdh_batch.errors import BDHError
from bdh_batch.http.errors import error_response
from bdh_batch.http.transport.budgets import BufferBudget
from bdh_batch.observability.metrics import Metrics

log = logging.getLogger(__name__)

BODILESS = (204, 304)
UNSAFE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # in a header: it could begin another one
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
PREFIX = b"HTTP/1.1 "  # what every response begins with, whatever becomes of its request
HOLD = "bdh_batch.hold"  # in a scope: `Exchange.hold`
RELEASE = "bdh_batch.release"  # in a scope: `Exchange.release`
EXCHANGE = "bdh_batch.exchange"  # in a scope: the exchange, as a `responses.generation.DirectWriter`
# After a client has ended its sending: when to find out whether it has gone. Each takes a byte (`Exchange._probe`).
PROBE_SECONDS = (0.0, 0.05, 0.2, 1.0, 5.0, 20.0, 60.0, 180.0, 600.0)
DISCONNECT = {"type": "http.disconnect"}


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def date_header() -> bytes:
    return _date_line(int(time.time()))


@lru_cache(maxsize=1)
def _date_line(now: int) -> bytes:
    return b"date: " + formatdate(now, usegmt=True).encode() + b"\r\n"


class ClientConnection(Protocol):
    """The part of a connection that an exchange uses."""

    budget: BufferBudget
    writable: asyncio.Event

    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...

    def answered(self) -> None:
        """The response is complete."""

    def account(self) -> None:
        """Has the budget know what is held."""

    def steer(self) -> None:
        """Reads on, or does not, by what waits to be looked at."""

    async def turn(self) -> None:
        """Waits until it is this connection's turn, for work that the application does."""


class Exchange:
    """A request that is read and answered.

    A response without a length is sent in chunks; to a client of HTTP/1.0 it ends with the connection.
    """

    __slots__ = (
        *("_body", "_changed", "_chunked", "_connection", "_error", "_expects_continue", "_head", "_left", "_probed"),
        *(
            "_scope",
            "_timer",
            "_body_delivered",
            "complete",
            "gone",
            "keep_alive",
            "more_body",
            "size",
            "started",
            "unread",
        ),
    )

    def __init__(self, connection: ClientConnection, scope: Scope, size: int, keep_alive: bool) -> None:
        self._connection = connection
        self._scope = scope
        scope[HOLD], scope[RELEASE], scope[EXCHANGE] = self.hold, self.release, self
        self._expects_continue = scope["http_version"] == "1.1" and (b"expect", b"100-continue") in (
            (name, value.lower()) for name, value in scope["headers"]
        )
        self._changed = asyncio.Event()  # there is something for `receive`
        self._body: list[bytes] = []
        self._body_delivered = False  # the application has received the last of the body
        self._error: BDHError | None = None
        self._head = b""  # of the response, until its first bytes of body come: both go in one write
        self._probed = 0  # bytes of the head that are sent already
        self._chunked = False
        self._timer: asyncio.TimerHandle | None = None
        self._left: int | None = None  # bytes of the response's body, where they are known
        self.keep_alive = keep_alive
        self.size = size  # bytes that it holds: head and body, until it has been answered
        self.unread = 0  # bytes of the body that the application has not asked for
        self.more_body = True
        self.started = False
        self.complete = False
        self.gone = False  # the client has left

    async def run(self, app: ASGIApp) -> None:
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:
            log.exception("%s %s failed outside the application", self._scope["method"], self._scope["path"])
        finally:
            if not self.complete and not self.gone:  # cut short: a client must not take this for the whole
                self._connection.write(self._head[self._probed :])
                self._connection.close()

    # Callbacks of the connection

    def feed(self, body: bytes) -> None:
        if self.complete or self._error is not None:
            return  # the application will not read it
        self._body.append(body)
        self.size += len(body)
        self.unread += len(body)
        self._changed.set()

    def end_body(self) -> None:
        self.more_body = False
        self._changed.set()

    def fail(self, error: BDHError) -> None:
        """Lets the application's next look at the body raise `error`, and forgets the body."""
        self._error = error
        self._body.clear()
        self.size = self.unread = 0
        self._changed.set()

    def leave(self) -> None:
        """The client has gone."""
        self.gone = True
        self._stop_watching()
        self._changed.set()

    def watch_for_leaving(self, times: int = 0) -> None:
        """Finds out, now and then until it is answered, whether a client that has ended its sending is still there."""
        if times < len(PROBE_SECONDS):
            self._timer = asyncio.get_running_loop().call_later(PROBE_SECONDS[times], self._look_for_leaving, times)

    def _look_for_leaving(self, times: int) -> None:
        if not self.gone and self._probe():
            self.watch_for_leaving(times + 1)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _probe(self) -> bool:
        """Sends one byte that changes nothing: a client that has only ended its own sending takes it, one that has gone
        resets the connection. Before the response that is a byte of what every response begins with; between chunks it
        is a leading zero of the next one's size. False where there is no such byte."""
        begun = self.started and not self._head
        if self.complete or (begun and not self._chunked) or (not begun and self._probed == len(PREFIX)):
            return False
        self._connection.write(b"0" if begun else PREFIX[self._probed : self._probed + 1])
        self._probed += 0 if begun else 1
        return True

    # What the application says

    async def hold(self, size: int) -> None:
        """Counts bytes that the application made of the body, and lets others have their turns. Raises Unavailable
        where they are too many."""
        self.size += size
        self._connection.account()
        self._connection.budget.check()
        await self._connection.turn()

    def release(self, size: int) -> None:
        """Stops counting bytes of the body that the application no longer has."""
        if not self.complete and self._error is None:
            self.size -= size
            self._connection.account()

    async def receive(self) -> Message:
        if self._awaits_continue and not self.started and not self.gone:
            self._expects_continue = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            if self.gone or self.complete:
                return DISCONNECT
            if self._error is not None:
                raise self._error
            if self._body or not (self.more_body or self._body_delivered):
                return self._next_part()
            self._changed.clear()
            await self._changed.wait()

    @property
    def _awaits_continue(self) -> bool:
        """Whether the client may be waiting for a word before it sends the body."""
        return self._expects_continue and self.more_body and not self._body

    def _next_part(self) -> Message:
        body, self._body, self.unread = b"".join(self._body), [], 0
        self._body_delivered = not self.more_body
        self._connection.steer()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Message) -> None:
        if not self._connection.writable.is_set() and not self.gone:
            await self._connection.writable.wait()
        if self.gone:
            return
        if not self.started:
            self._start(message["status"], message.get("headers", ()))
            return
        if self.complete:
            raise RuntimeError(f"{message['type']} after the response was complete")
        self._write(message.get("body", b""), message.get("more_body", False))

    @property
    def takes_parts(self) -> bool:
        """Whether a part of the response's body is written at once, as its connection is not behind."""
        return self.started and not (self.gone or self.complete) and self._connection.writable.is_set()

    def write_part(self, body: bytes) -> None:
        """Writes a part of the body, as `send` does, where it `takes_parts`. More has to come."""
        if self._chunked and not self._head:  # as mostly
            self._connection.write(b"%x\r\n%b\r\n" % (len(body), body))
        else:
            self._write(body, True)

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        lines = [status_line(status), date_header()]
        for name, value in headers:
            if UNSAFE.search(value):
                raise RuntimeError(f"the header {name!r} has a control character")
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
                continue
            lines.append(name + b": " + value + b"\r\n")
        if self._awaits_continue:  # the client may or may not send the body now: where the next request begins is open
            self.keep_alive = False
        if self._scope["method"] == "HEAD" or status in BODILESS:
            self._left = None
        elif self._left is None and self._scope["http_version"] == "1.1":
            self._chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        elif self._left is None:
            self.keep_alive = False
        lines.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        self._head = b"".join(lines)

    def _write(self, body: bytes, more: bool) -> None:
        if self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        elif self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the response's body has not the length that its head says")
        elif self._scope["method"] == "HEAD":
            body = b""
        if self._head:
            body, self._head = self._head[self._probed :] + body, b""
        self._connection.write(body)
        if not more:
            self.complete = True
            self.size = self.unread = 0
            self._body.clear()
            self._changed.set()
            self._stop_watching()
            self._connection.answered()


def refusal(error: BDHError, metrics: Metrics) -> bytes:
    """A whole response, to what is no request or to one that is not read."""
    response: Response = error_response(error)
    metrics.refused_unread(response.status_code)
    headers = [*response.raw_headers, (b"x-request-id", uuid4().hex.encode()), (b"connection", b"close")]
    lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
    return status_line(response.status_code) + lines + b"\r\n" + bytes(response.body)
