"""A connection, with bounds on what its client may send, and how long that, and taking the responses, may take.

One request at a time: what a client sends behind a request that is still being answered is not parsed before its turn,
and not read beyond a few. The parser gets what came in pieces that end where a request may end, and a connection with
more of them lets the event loop serve the others in between.

What a request's body may be, and how long it may take, is the middleware's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools
from starlette.types import Scope

from bdh_batch.errors import BDHError, Unavailable
from bdh_batch.http.auth.caller import UNIX
from bdh_batch.http.errors import HeadersTooLarge, HeaderTimeout, InvalidHTTP
from bdh_batch.http.request.head import OFFER, body_length, fill, without_offer
from bdh_batch.http.transport.budgets import WriteDeadline
from bdh_batch.http.transport.exchange import Exchange, refusal
from bdh_batch.http.transport.incoming import Expecting, Incoming
from bdh_batch.http.transport.site import Site

LINGER_SECONDS = 3.0  # in which what a client still sends is thrown away, so that it reads why
AHEAD_BYTES = 16 * 1024  # of later requests, read while one is answered: its client's leaving is seen behind them
UNREAD_BYTES = 64 * 1024  # of a body that are read before the application asks for them
TURN_BYTES = 8 * 1024  # of chunks that are parsed before others have their turn
BULK_BYTES = 16 * 1024  # that came at once: the next ones are read when it is this connection's turn again
FIRST_BYTES = 1024  # of chunks that are parsed as soon as they come


class Connection(asyncio.Protocol):
    """Reads the requests of one client connection, and writes their responses.

    Args:
        ended: is called once the connection is closed.
    """

    transport: asyncio.Transport

    def __init__(self, site: Site, ended: Callable[[], None]) -> None:
        self._site, self._ended = site, ended
        self._limits, self.budget = site.limits, site.budget
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._incoming = Incoming(site.limits.max_header_bytes)
        self._expecting = Expecting.HEAD
        self._length = 0  # bytes of the body that are still to come
        self._exchange: Exchange | None = None  # the last request; there is no other before it is answered and whole
        self._error: BDHError | None = None  # found by a callback of the parser
        self._over = False  # nothing that still comes is looked at
        self._eof = False  # the client has ended its sending
        self._reading = True
        self._waits = False  # for its turn, in which the parser goes on with the buffer
        self._bulk = False  # nothing is read before that
        self._timer: asyncio.TimerHandle | None = None  # for a head, for the next request, or for the end
        self.writable = asyncio.Event()
        self.writable.set()
        self._timing_head = True  # the timer is that of a head
        self.held = 0

    # Callbacks of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._unsent = WriteDeadline(self.transport, self._limits.write_seconds)
        self._site.enter(self)
        tls = transport.get_extra_info("sslcontext") is not None
        peer, here = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self._scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "scheme": "https" if tls else "http",
            "server": (str(here[0]), int(here[1])) if isinstance(here, tuple) else None,
            "client": (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else (UNIX, 0),
            "root_path": "",
        }
        self._half_closes = self.transport.can_write_eof()  # not with TLS
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._stop_timer()
        self._unsent.stop()
        if self._exchange is not None:
            self._exchange.leave()
        self.writable.set()
        self._incoming.clear()
        self.budget.update(self, 0)
        self._site.leave(self)
        self._ended()

    def data_received(self, data: bytes) -> None:
        if not self._over:
            self._incoming.add(data)
            if not self._waits:
                self._advance(FIRST_BYTES)
        if len(data) >= BULK_BYTES:
            self._bulk = True
            self._wait_for_turn()
        self.account()
        self.steer()

    def eof_received(self) -> bool:
        """The client sends no more. It may still wait for what it has asked for, which deserves its response."""
        self._eof = True
        if self._over or not self._half_closes or (self._expecting is not Expecting.LATER and not self._waits):
            return False
        if self._expecting is Expecting.LATER and self._exchange is not None:
            self._exchange.watch_for_leaving()
        return True

    def pause_writing(self) -> None:
        self.writable.clear()
        self._unsent.start()

    def resume_writing(self) -> None:
        self._unsent.stop()
        self.writable.set()

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        self._url, self._headers = b"", list[tuple[bytes, bytes]]()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if self._expecting is Expecting.HEAD and name != OFFER:  # after a body they must not pass for the request's own
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._exchange is not None and not self._exchange.complete:
            raise self._failure(InvalidHTTP("A request began inside another one."))
        version, headers = self._parser.get_http_version(), self._headers
        scope = {**self._scope, "headers": headers, "state": {}}
        try:
            fill(scope, self._parser.get_method(), version, self._url, headers)
        except InvalidHTTP as error:
            raise self._failure(error) from None
        if self._parser.should_upgrade():
            raise self._failure(InvalidHTTP("Only HTTP/1.1 is supported."))
        self._stop_timer()
        self._incoming.unseen = 0
        length = body_length(headers)
        self._length = length or 0
        self._expecting = Expecting.CHUNKS if length is None else Expecting.BODY
        size = len(self._url) + sum([len(name) + len(value) for name, value in headers])
        keep_alive = version == "1.1" and self._parser.should_keep_alive()
        self._exchange = Exchange(self, scope, size, keep_alive)
        task = self._loop.create_task(self._exchange.run(self._site.app))
        self._site.tasks.add(task)
        task.add_done_callback(self._site.tasks.discard)

    def on_body(self, body: bytes) -> None:
        assert self._exchange is not None
        self._incoming.unseen = 0
        self._length -= len(body)
        self._exchange.feed(body)

    def on_message_complete(self) -> None:
        assert self._exchange is not None
        self._incoming.unseen = 0
        self._expecting = Expecting.LATER
        self._exchange.end_body()

    # Callbacks of the exchange

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def answered(self) -> None:
        """The response is complete."""
        exchange = self._exchange
        assert exchange is not None
        self.account()
        if self._over:
            return
        if not exchange.keep_alive:
            self._end()
        elif self._expecting is Expecting.LATER:
            self._next()
        else:  # Its body was not read. What still comes of that is thrown away, but not for ever.
            self._timer = self._loop.call_later(LINGER_SECONDS, self.close)
            self.steer()

    def close(self) -> None:
        """Closes the connection as soon as what has been written is sent; not later than a stalled client may take."""
        self._over = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        unsent = self.transport.get_write_buffer_size()
        self.transport.close()
        if unsent:
            self._timer = self._loop.call_later(self._limits.write_seconds, self.transport.abort)

    def account(self) -> None:
        """Has the budget know what is held."""
        exchange = self._exchange
        self.budget.update(self, len(self._incoming) + (0 if exchange is None else exchange.size))

    def steer(self) -> None:
        """Reads on, or does not, by what waits to be looked at."""
        waiting, exchange = len(self._incoming), self._exchange
        full = waiting > AHEAD_BYTES and (self._waits or self._expecting is Expecting.LATER)
        unread = exchange is not None and exchange.unread > UNREAD_BYTES
        reading = not (self._bulk or full or unread) or (self._over and not self._bulk)
        if reading != self._reading and not self._eof and not self.transport.is_closing():
            self._reading = reading
            (self.transport.resume_reading if reading else self.transport.pause_reading)()

    # Callbacks of the server and its budget

    def shutdown(self) -> None:
        """The request that is being answered is the last."""
        if self._exchange is None or self._exchange.complete:
            self.close()
        else:
            self._exchange.keep_alive = False

    @property
    def sheddable(self) -> bool:
        return not self._over and self.held > 0 and (self._in_body or bool(self._incoming))

    def shed(self, error: Unavailable) -> None:
        exchange = self._exchange
        self._incoming.clear()
        if exchange is None or exchange.complete:
            self._refuse(error)
            return
        exchange.keep_alive = False  # what came behind it has been thrown away
        if self._in_body:
            exchange.fail(error)
        self.account()

    # The parser's turns

    @property
    def _in_body(self) -> bool:
        return self._expecting in (Expecting.BODY, Expecting.CHUNKS)

    def take_turn(self) -> None:
        self._waits = self._bulk = False
        if not self._over:
            self._advance(TURN_BYTES)
        self.steer()

    def _wait_for_turn(self) -> None:
        if not self._waits:
            self._waits = True
            self._site.turns.add(self.take_turn)

    async def turn(self) -> None:
        """Waits until it is this connection's turn, for work that the application does."""
        came = asyncio.Event()
        self._site.turns.add(came.set)
        await came.wait()

    def _advance(self, most: int) -> None:
        """Gives the parser what is there, up to the end of one request, or of some `most` bytes of chunks."""
        try:
            self._parse_pieces(most)
            if self._over:
                return
            self._incoming.check()
        except HeadersTooLarge as error:
            self._refuse(error)
            return
        self.account()
        self._settle()
        self.steer()

    def _parse_pieces(self, most: int) -> None:
        parsed = 0
        while not self._over and self._incoming and self._expecting is not Expecting.LATER:
            chunks = self._expecting is Expecting.CHUNKS
            if chunks and parsed >= most:
                self._wait_for_turn()
                return
            piece = self._piece(most - parsed)
            if not piece:
                return
            self._parse(piece)
            parsed += len(piece) if chunks else 0

    def _piece(self, most: int) -> bytes:
        """What the parser may have next, of chunks at `most` so many bytes; nothing where more has to come first."""
        if self._expecting is Expecting.BODY:
            return self._incoming.take(self._length)
        return self._incoming.take_chunks(most) if self._expecting is Expecting.CHUNKS else self._incoming.take_head()

    def _settle(self) -> None:
        """What follows from what has been parsed."""
        if self._waits:
            return
        if self._expecting is Expecting.LATER:
            assert self._exchange is not None
            if self._exchange.complete:  # it was answered before its body was whole
                self._stop_timer()
                self._next()
            elif not self._incoming.plausible:
                self._refuse(InvalidHTTP("The request is not valid HTTP."))
            elif self._eof:
                self._exchange.watch_for_leaving()
        elif self._eof:
            self.close()  # nothing that is missing will come
        elif self._expecting is Expecting.HEAD and not self._timing_head:
            self._expect_head()

    def _parse(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(without_offer(piece) if self._expecting is Expecting.HEAD else piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(self._error or InvalidHTTP("The request is not valid HTTP."))

    def _next(self) -> None:
        """The next request: at once, if it is there already, but not before others had their turn."""
        self._expecting = Expecting.HEAD
        if self._incoming:
            self._timing_head = False
            self._wait_for_turn()
            self.steer()
        elif self._eof:
            self.close()
        else:
            self._timing_head = False
            self._timer = self._loop.call_later(self._limits.keep_alive_seconds, self.close)
            self.steer()

    # Ends

    def _end(self) -> None:
        """The last response is written. A client that still sends must not have it taken away by a reset."""
        unread = self._in_body or bool(self._incoming) or not self._reading
        if unread and not self._eof:
            self._linger()
        else:
            self.close()

    def _linger(self) -> None:
        self._over = True
        self._incoming.clear()
        self._stop_timer()
        self.account()
        self.steer()
        if self._half_closes and not self.transport.is_closing():
            self.transport.write_eof()
        self._timer = self._loop.call_later(LINGER_SECONDS, self.close)

    def _refuse(self, error: BDHError) -> None:
        """The last thing that is said on this connection."""
        exchange = self._exchange
        if exchange is not None and not exchange.complete:
            if exchange.started or not self._in_body:
                self.close()  # another request is being answered, and that is not a response to it
                return
            exchange.leave()
        elif self._in_body:
            self._linger()  # the client has received its response
            return
        self.write(refusal(error, self._site.metrics))
        self._linger()

    def _failure(self, error: BDHError) -> BDHError:
        """What a callback of the parser raises, which ends up in `_parse`."""
        self._error = error
        return error

    # Timers

    def _expect_head(self) -> None:
        self._stop_timer()
        self._timing_head = True
        self._timer = self._loop.call_later(self._limits.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._incoming or self._incoming.unseen:
            seconds = self._limits.header_seconds
            self._refuse(
                HeaderTimeout(f"The headers did not arrive within {seconds:g} seconds (limits.header_seconds).")
            )
        else:
            self.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
