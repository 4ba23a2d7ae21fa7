"""A front end's connection to one engine process, made again whenever it is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from bdh_batch.backends.recorder import recorded, step_file
from bdh_batch.backends.wire import (
    MOST_BYTES,
    PROTOCOL,
    Abort,
    Ask,
    FromEngine,
    Gain,
    Gains,
    Hello,
    Malformed,
    Pulse,
    Refusal,
    Start,
    Started,
    Told,
    Unpacker,
    Welcome,
    frame,
    unpacked_error,
)
from bdh_batch.errors import BDHError

log = logging.getLogger(__name__)

FIRST_RETRY, LONGEST_RETRY = 0.02, 1.0  # seconds
METRICS_SECONDS = 2.0


class State(StrEnum):
    """What a front end knows of an engine."""

    CONNECTING = "connecting"
    READY = "ready"
    LEAVING = "leaving"  # it takes nothing new, and what it has should go on elsewhere
    UNHEALTHY = "unhealthy"  # it lives, and computes nothing


class Reader(Protocol):
    """Takes what a stream's sequences gain.

    `proven` says whether it has had anything yet of the engine that computes it.
    """

    proven: bool

    def started(self, replica: Replica, error: BDHError | None) -> None: ...

    def gained(self, gain: Gain) -> None: ...


class Replica:
    """One engine process, as a front end sees it.

    Args:
        socket: the path of its socket.
        heartbeat: seconds without a sign of life after which it is given up; it may come back.
        changed: is called when its state has changed.
        let_go: is called with those whose streams it will not go on with.
        fits: says why an engine that greets is none of ours, or None.
    """

    def __init__(
        self,
        socket: Path,
        version: str,
        secret: str,
        heartbeat: float,
        changed: Callable[[Replica], None],
        let_go: Callable[[Replica, Sequence[Reader]], None],
        fits: Callable[[Welcome], str | None],
    ) -> None:
        self.socket = socket
        self.heartbeat = heartbeat
        self.state = State.CONNECTING
        self.welcome: Welcome | None = None
        self.pulse: Pulse | None = None
        self.readers: dict[int, Reader] = {}
        self._hello = Hello(PROTOCOL, version, secret)
        self._changed = changed
        self._gives_up = let_go
        self._fits = fits
        self._link: _Link | None = None
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._numbers = 0
        self._retry = FIRST_RETRY
        self._connecting = asyncio.create_task(self._connect())

    @property
    def outstanding(self) -> int:
        """Streams that it computes for this front end, and what it says that it computes for all, if that is more."""
        others = 0 if self.pulse is None else self.pulse.running + self.pulse.waiting
        return max(len(self.readers), others)

    def start(self, reader: Reader, make: Callable[[int], Start]) -> int:
        """Has it compute what `make` makes of the number of a new stream, which is returned."""
        assert self._link is not None
        self._numbers += 1
        self.readers[self._numbers] = reader
        self._link.send(make(self._numbers))
        return self._numbers

    def abort(self, stream: int) -> None:
        """Nothing more of that stream is read. Idempotent."""
        if self.readers.pop(stream, None) is not None and self._link is not None:
            self._link.send(Abort(stream))

    async def metrics(self) -> bytes:
        """As Prometheus reads them; empty where it does not answer."""
        if self._link is None:
            return b""
        self._numbers += 1
        number, asked = self._numbers, asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self._link.send(Ask(number))
        try:
            async with asyncio.timeout(METRICS_SECONDS):
                return bytes(await asked)
        except TimeoutError:
            return b""
        finally:
            del self._asked[number]

    @property
    def in_step(self) -> Collection[str]:
        """The requests that it computed when it was last heard of, and that had had nothing of it yet."""
        return recorded(step_file(self.socket))

    def leave(self) -> None:
        """It is gone for good: what it has goes on elsewhere."""
        self.close()
        self.state = State.LEAVING
        self._let_go()

    def close(self) -> None:
        """Idempotent."""
        self._connecting.cancel()
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def greeted(self, welcome: Welcome) -> None:
        """It has said what it is."""
        if (why := self._fits(welcome)) is not None:
            raise Malformed(why)
        self.welcome, self._retry = welcome, FIRST_RETRY
        self._enter(State.READY)

    def take(self, message: FromEngine) -> None:
        """Raises Malformed where no engine says that."""
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
                    reader.started(self, None if error is None else unpacked_error(error))
            case Pulse():
                self._felt(message)
            case Told(number, metrics):
                asked = self._asked.get(number)
                if asked is not None and not asked.done():
                    asked.set_result(metrics)
            case Refusal(reason):
                raise Malformed(f"it refuses: {reason}")
            case _:
                raise Malformed("it has greeted twice")

    def lost(self, link: _Link, why: str) -> None:
        if link is not self._link:
            return
        self._link = None
        if self.welcome is not None:
            log.warning("the engine at %s is lost: %s", self.socket, why)
        self.welcome, self.pulse = None, None
        self._enter(State.CONNECTING)
        self._let_go()
        self._connecting = asyncio.create_task(self._connect())

    def _felt(self, pulse: Pulse) -> None:
        self.pulse = pulse
        well = State.READY if pulse.problem is None else State.UNHEALTHY
        state = State.LEAVING if pulse.leaving else well
        if state is not self.state:
            if state is not State.READY:
                log.warning("the engine at %s is %s: %s", self.socket, state, pulse.problem or "it is being replaced")
            self._enter(state)
        if state is not State.READY:
            self._let_go()

    def _let_go(self) -> None:
        """Its streams go on elsewhere."""
        readers = [*self.readers.values()]
        for stream in [*self.readers]:
            self.abort(stream)
        if readers:
            self._gives_up(self, readers)

    def _enter(self, state: State) -> None:
        self.state = state
        self._changed(self)

    async def _connect(self) -> None:
        while True:
            await asyncio.sleep(self._retry)
            self._retry = min(2 * self._retry, LONGEST_RETRY)
            try:
                make = partial(_Link, self)
                _, self._link = await asyncio.get_running_loop().create_unix_connection(make, str(self.socket))
            except OSError:
                continue
            self._link.send(self._hello)
            return


class _Link(asyncio.Protocol):
    """One connection."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._unpacker = Unpacker(FromEngine)
        self._greeted = False
        self._why = "it has closed the connection"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._watching = self._loop.call_later(self._replica.heartbeat, self._watch)

    def connection_lost(self, error: Exception | None) -> None:
        self._watching.cancel()
        self._replica.lost(self, self._why)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        try:
            for message in self._unpacker.feed(data):
                if self._greeted:
                    self._replica.take(message)
                    continue
                if isinstance(message, Refusal):
                    raise Malformed(f"it refuses: {message.reason}")
                if not isinstance(message, Welcome):
                    raise Malformed("it has not said what it is")
                self._greeted, self._unpacker.most = True, MOST_BYTES
                self._replica.greeted(message)
        except Malformed as error:
            log.error("the engine at %s: %s", self._replica.socket, error)
            self._give_up(str(error))

    def send(self, message: object) -> None:
        if not self._transport.is_closing():
            self._transport.write(frame(message))

    def close(self) -> None:
        self._transport.close()

    def _watch(self) -> None:
        silent = self._loop.time() - self._heard
        if silent >= self._replica.heartbeat:
            self._give_up(f"no sign of life for {silent:.1f} s")
        else:
            self._watching = self._loop.call_later(self._replica.heartbeat - silent, self._watch)

    def _give_up(self, why: str) -> None:
        self._why = why
        self._transport.abort()
