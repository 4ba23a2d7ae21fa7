"""A front end's connection to one engine process, which is made anew whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from functools import partial
from typing import Protocol, cast

from bdh_batch.backends.address import Address
from bdh_batch.backends.wire import (
    MOST_BYTES,
    PROTOCOL,
    Abort,
    FromEngine,
    Gain,
    Gains,
    Heartbeat,
    Hello,
    Malformed,
    Refusal,
    Start,
    Started,
    Unpacker,
    Welcome,
    frame,
)
from bdh_batch.errors import BDHError

log = logging.getLogger(__name__)

FIRST_RETRY, LONGEST_RETRY = 0.02, 1.0  # seconds
LATE_SECONDS = 0.1  # in which what has been received is read, before an engine counts as lost


class State(StrEnum):
    """The state of an engine, as a front end knows it."""

    CONNECTING = "connecting"
    READY = "ready"
    LEAVING = "leaving"  # it gets no new requests, and its streams move to other engines
    UNHEALTHY = "unhealthy"  # its process lives, and cannot compute


class Reader(Protocol):
    """Receives the deltas of one stream.

    `id` is that of its request; `has_token` says whether the engine that computes it now has sent any.
    """

    has_token: bool

    @property
    def id(self) -> str: ...

    def started(self, replica: Replica, error: BDHError | None) -> None: ...

    def gained(self, gain: Gain) -> None: ...


def outstanding_streams(reported: int, then: int, now: int) -> int:
    """Returns an engine's load as a front end reckons it; it is never less than the front end's own.

    Args:
        reported: by the last heartbeat, of all front ends.
        then: of this front end, when that heartbeat came.
        now: of this front end.
    """
    return max(now, reported + now - then)


class Replica:
    """One engine process, as a front end sees it.

    Args:
        address: where it listens.
        heartbeat_timeout: seconds without a message after which the engine counts as lost; it may come back.
        changed: is called when the state has changed.
        on_lost: is called with the readers of streams that this engine will not finish.
        fits: returns why an engine that sent `Welcome` cannot be used, or None if it can.
    """

    def __init__(
        self,
        address: Address,
        version: str,
        secret: str,
        heartbeat_timeout: float,
        changed: Callable[[Replica], None],
        on_lost: Callable[[Replica, Sequence[Reader]], None],
        fits: Callable[[Welcome], str | None],
    ) -> None:
        self.address = address
        self.heartbeat_timeout = heartbeat_timeout
        self.state = State.CONNECTING
        self.welcome: Welcome | None = None  # the last one: it stays when the connection is lost
        self.last_heartbeat: Heartbeat | None = None
        self.readers: dict[int, Reader] = {}
        self._reported_at = 0  # streams of this front end when the last heartbeat came
        self._hello = Hello(PROTOCOL, version, secret)
        self._changed = changed
        self._on_lost = on_lost
        self._fits = fits
        self._connection: _Connection | None = None
        self._numbers = 0
        self._silent: Collection[str] = ()  # requests that it was lost with before their first token
        self._retry = FIRST_RETRY
        self._connecting = asyncio.create_task(self._connect())

    @property
    def outstanding(self) -> int:
        """The engine's load: all sequences of its last heartbeat, and what this front end has begun and ended since."""
        if self.last_heartbeat is None:
            return len(self.readers)
        reported = self.last_heartbeat.running + self.last_heartbeat.waiting
        return outstanding_streams(reported, self._reported_at, len(self.readers))

    def start(self, reader: Reader, make: Callable[[int], Start]) -> int:
        """Sends the message that `make` returns for the number of a new stream, and returns that number."""
        assert self._connection is not None
        self._numbers += 1
        self.readers[self._numbers] = reader
        self._connection.send(make(self._numbers))
        return self._numbers

    def abort(self, stream: int) -> None:
        """Ends a stream and drops its deltas that are still to come. Idempotent."""
        if self.readers.pop(stream, None) is not None and self._connection is not None:
            self._connection.send(Abort(stream))

    @property
    def in_step(self) -> Collection[str]:
        """Ids of the requests in the engine's last step that had no token of it yet.

        Of an engine whose record is on another machine, they are all that had none.
        """
        known = self.address.in_step()
        return self._silent if known is None else known

    def leave(self) -> None:
        """Closes the connection for good and moves the engine's streams to others."""
        self.close()
        self.state = State.LEAVING
        self._hand_over()

    def close(self) -> None:
        """Closes the connection and does not make it anew. Idempotent."""
        self._connecting.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def greeted(self, welcome: Welcome) -> None:
        """Handles the first message of an engine. Raises Malformed where the engine cannot be used."""
        if (why := self._fits(welcome)) is not None:
            raise Malformed(why)
        self.welcome, self._retry = welcome, FIRST_RETRY
        self._enter(State.READY)

    def take(self, message: FromEngine) -> None:
        """Handles any later message of an engine. Raises Malformed where no engine should send it."""
        match message:
            case Gains(gains):
                for gain in gains:
                    reader = self.readers.get(gain.stream)
                    if reader is not None:
                        reader.gained(gain)
            case Started(stream, error):
                reader = self.readers.get(stream)
                if error is not None:
                    self.readers.pop(stream, None)
                if reader is not None:
                    reader.started(self, error)
            case Heartbeat():
                self._on_heartbeat(message)
            case Refusal(reason):
                raise Malformed(f"it refused: {reason}")
            case _:
                raise Malformed("it sent a second Welcome")

    def lost(self, connection: _Connection, reason: str) -> None:
        """Moves the engine's streams to others, as its connection was closed, and connects again."""
        if connection is not self._connection:
            return
        self._connection = None
        if self.state is not State.CONNECTING:
            level = logging.INFO if self.state is State.LEAVING else logging.WARNING
            log.log(level, "the engine at %s is lost: %s", self.address, reason)
        self.last_heartbeat = None
        self._enter(State.CONNECTING)
        self._hand_over()
        self._connecting = asyncio.create_task(self._connect())

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self.last_heartbeat, self._reported_at = heartbeat, len(self.readers)
        well = State.READY if heartbeat.problem is None else State.UNHEALTHY
        state = State.LEAVING if heartbeat.leaving else well
        if state is not self.state:
            if state is State.UNHEALTHY:
                log.warning("the engine at %s is unhealthy: %s", self.address, heartbeat.problem)
            self._enter(state)
        if state is not State.READY:
            self._hand_over()

    def _hand_over(self) -> None:
        """Gives its streams back, to be computed by other engines."""
        readers = [*self.readers.values()]
        self._silent = {each.id for each in readers if not each.has_token}
        for stream in [*self.readers]:
            self.abort(stream)
        if readers:
            self._on_lost(self, readers)

    def _enter(self, state: State) -> None:
        self.state = state
        self._changed(self)

    async def _connect(self) -> None:
        while True:
            await asyncio.sleep(self._retry)
            self._retry = min(2 * self._retry, LONGEST_RETRY)
            try:
                self._connection = await self.address.connect(partial(_Connection, self))
            except OSError:
                continue
            self._connection.send(self._hello)
            return


class _Connection(asyncio.Protocol):
    """One connection to the engine of a replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._unpacker = Unpacker(FromEngine)
        self._greeted = False
        self._late = False  # whether a heartbeat is overdue
        self._reason = "it closed the connection"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._watching = self._loop.call_later(self._replica.heartbeat_timeout, self._watch)

    def connection_lost(self, error: Exception | None) -> None:
        self._watching.cancel()
        self._replica.lost(self, self._reason)

    def data_received(self, data: bytes) -> None:
        self._heard, self._late = self._loop.time(), False
        try:
            for message in self._unpacker.feed(data):
                if self._greeted:
                    self._replica.take(message)
                    continue
                if isinstance(message, Refusal):
                    raise Malformed(f"it refused: {message.reason}")
                if not isinstance(message, Welcome):
                    raise Malformed("its first message is no Welcome")
                self._greeted, self._unpacker.most = True, MOST_BYTES
                self._replica.greeted(message)
        except Malformed as error:
            log.error("the engine at %s: %s", self._replica.address, error)
            self._disconnect(str(error))

    def send(self, message: object) -> None:
        if not self._transport.is_closing():
            self._transport.write(frame(message))

    def close(self) -> None:
        self._transport.close()

    def _watch(self) -> None:
        silent = self._loop.time() - self._heard
        if silent >= self._replica.heartbeat_timeout and not self._late:
            self._late = True  # this process may have been late itself: what waits is read first
            self._watching = self._loop.call_later(LATE_SECONDS, self._watch)
        elif silent >= self._replica.heartbeat_timeout:
            self._disconnect(f"no heartbeat for {silent:.1f} s")
        else:
            self._watching = self._loop.call_later(self._replica.heartbeat_timeout - silent, self._watch)

    def _disconnect(self, reason: str) -> None:
        self._reason = reason
        self._transport.abort()
