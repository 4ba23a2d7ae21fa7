"""A front end's connection to one engine process, which is made anew whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from functools import partial
from typing import Protocol, cast

from bdh_batch.backends.address import Address
from bdh_batch.backends.outstanding import Outstanding
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
# Bytes that wait to be sent to an engine, two of the longest prompts. With more it gets no requests until it has read
# three quarters of them.
MOST_UNSENT = 2**25


class State(StrEnum):
    """The state of an engine, as a front end knows it."""

    CONNECTING = "connecting"
    READY = "ready"
    LEAVING = "leaving"  # it gets no new requests, and its streams move to other engines
    UNHEALTHY = "unhealthy"  # its process lives, and cannot compute


class Reader(Protocol):
    """Receives the deltas of one stream.

    `id` and `tenant` are those of its request; `has_token` says whether the engine that computes it now has sent any.
    """

    has_token: bool

    @property
    def id(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    def started(self, replica: Replica, error: BDHError | None) -> None: ...

    def gained(self, gain: Gain) -> None: ...


class Replica:
    """One engine process, as a front end sees it.

    Args:
        address: where it listens.
        heartbeat_timeout: seconds without a message after which the engine counts as lost; it may come back.
        changed: is called when the state has changed.
        on_lost: is called with the readers of streams that this engine will not finish.
        fits: returns why an engine that sent `Welcome` cannot be used, or None if it can.

    `outstanding` is what it has to do.
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
        self.readers: dict[int, Reader] = {}
        self.outstanding = Outstanding()
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
    def accepts(self) -> bool:
        """Whether it can be sent requests: it is ready, and reads what it was sent before."""
        return self.state is State.READY and self._connection is not None and not self._connection.is_behind

    def start(self, reader: Reader, make: Callable[[int], Start]) -> int:
        """Sends the message that `make` returns for the number of a new stream, and returns that number."""
        assert self._connection is not None
        self._numbers += 1
        self.readers[self._numbers] = reader
        self.outstanding.begin(reader.tenant)
        self._connection.send(make(self._numbers))
        return self._numbers

    def abort(self, stream: int) -> None:
        """Ends a stream and drops its deltas that are still to come. Idempotent."""
        if self._drop(stream) is not None and self._connection is not None:
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
                reader = self.readers.get(stream) if error is None else self._drop(stream)
                if reader is not None:
                    reader.started(self, error)
            case Heartbeat():
                self._on_heartbeat(message)
            case Refusal(reason):
                raise Malformed(f"it refused: {reason}")
            case _:
                raise Malformed("it sent a second Welcome")

    def caught_up(self) -> None:
        """Lets streams be sent to it again, as it has read what waited for it."""
        self._changed(self)

    def lost(self, connection: _Connection, reason: str) -> None:
        """Moves the engine's streams to others, as its connection was closed, and connects again."""
        if connection is not self._connection:
            return
        self._connection = None
        if self.state is not State.CONNECTING:
            level = logging.INFO if self.state is State.LEAVING else logging.WARNING
            log.log(level, "the engine at %s is lost: %s", self.address, reason)
        self.outstanding.report(0, 0)
        self._enter(State.CONNECTING)
        self._hand_over()
        self._connecting = asyncio.create_task(self._connect())

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self.outstanding.report(heartbeat.sequences, heartbeat.prompt_tokens)
        well = State.READY if heartbeat.problem is None else State.UNHEALTHY
        state = State.LEAVING if heartbeat.leaving else well
        if state is not self.state:
            if state is State.UNHEALTHY:
                log.warning("the engine at %s is unhealthy: %s", self.address, heartbeat.problem)
            self._enter(state)
        if state is not State.READY:
            self._hand_over()

    def _drop(self, stream: int) -> Reader | None:
        reader = self.readers.pop(stream, None)
        if reader is not None:
            self.outstanding.end(reader.tenant)
        return reader

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
    """One connection to the engine of a replica.

    `is_behind` says whether more than MOST_UNSENT bytes wait to be sent. Beyond them there are at most the request that
    came last, and a few bytes to abort each stream that was started.
    """

    def __init__(self, replica: Replica) -> None:
        self.is_behind = False
        self._replica = replica
        self._unpacker = Unpacker(FromEngine)
        self._greeted = False
        self._late = False  # whether a heartbeat is overdue
        self._reason = "it closed the connection"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=MOST_UNSENT)
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._watching = self._loop.call_later(self._replica.heartbeat_timeout, self._watch)

    def connection_lost(self, error: Exception | None) -> None:
        self._watching.cancel()
        self._replica.lost(self, self._reason)

    def pause_writing(self) -> None:
        self.is_behind = True
        log.warning("the engine at %s does not read what it is sent: it gets no requests", self._replica.address)

    def resume_writing(self) -> None:
        self.is_behind = False
        self._replica.caught_up()

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
