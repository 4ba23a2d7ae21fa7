"""The server that an engine process runs for front ends: they connect, start streams, and receive deltas.

All deltas of a step go to a front end in one message. Where a front end reads slower than the engine computes, the
deltas of its sequences are merged until it has caught up.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol, cast

from bdh_batch.backends.local import LocalBackend, Submission
from bdh_batch.backends.wire import (
    MOST_BYTES,
    PROTOCOL,
    Abort,
    FromFront,
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
from bdh_batch.engine.worker import Load
from bdh_batch.errors import BDHError, GenerationFailed
from bdh_batch.messages import Delta, Gathering, Grammar, GrammarText
from bdh_batch.scheduler.sequence import Sequence

log = logging.getLogger(__name__)

GREETING_SECONDS = 5.0
BUFFER = 2**22  # bytes that are buffered for a front end before deltas are merged
MOST_GUESTS = 256  # connections that have not sent their Hello yet


class Compiles(Protocol):
    """Compiles grammars that a front end has compiled in its sandbox before: `text.grammar.Grammars`."""

    def compiled(self, text: GrammarText) -> Awaitable[Grammar]: ...


class EnginePort:
    """Serves a backend to the front ends that connect.

    Args:
        welcome: the message that each front end gets first.
        secret: what front ends have to send to be let in.
        heartbeat_seconds: seconds between two heartbeats.
    """

    def __init__(
        self,
        backend: LocalBackend,
        grammars: Compiles,
        welcome: Welcome,
        secret: str,
        heartbeat_seconds: float,
        load: Callable[[], Load],
    ) -> None:
        self.backend = backend
        self.grammars = grammars
        self.welcome = welcome
        self.secret = secret
        self.heartbeat_seconds = heartbeat_seconds
        self._load = load
        self.connections: set[Connection] = set()
        self.guests: dict[Connection, None] = {}  # those that are not authenticated, as they have come
        self.idle = asyncio.Event()  # set while there is no stream
        self.idle.set()
        self._leaving = False

    def new_connection(self) -> asyncio.Protocol:
        """Makes the protocol of a new connection."""
        return Connection(self)

    def leave(self) -> None:
        """Asks all front ends to move their streams to other engines."""
        self._leaving = True
        for connection in [*self.connections]:
            if connection not in self.guests:
                connection.send(self.state())

    def receive(self, guest: Connection) -> None:
        """Waits for its Hello. Where too many have not sent theirs, the first of them has had its time."""
        self.connections.add(guest)
        self.guests[guest] = None
        if len(self.guests) > MOST_GUESTS:
            first = next(iter(self.guests))
            del self.guests[first]
            first.disconnect()

    def streams_changed(self) -> None:
        """Updates `idle`; is called when a stream has begun or ended."""
        (self.idle.clear if any(connection.streams for connection in self.connections) else self.idle.set)()

    def state(self) -> Heartbeat:
        load = self._load()
        sequences = load.running + load.waiting + load.swapped
        return Heartbeat(sequences, load.prompt_tokens, self.backend.health(), self._leaving)

    def close(self) -> None:
        for connection in [*self.connections]:
            connection.close()


class Stream:
    """A front end's request while it is computed: the outbox of its sequences.

    Deltas that the front end has already received from another engine are not sent again.
    """

    def __init__(self, connection: Connection, start: Start) -> None:
        self._connection = connection
        self._number = start.stream
        self._ahead = {
            index: [each.ahead, each.characters, each.logprobs]
            for index, each in enumerate(start.progress)
            if each.ahead or each.characters or each.logprobs
        }
        self._open = 0
        self._submission: Submission | None = None
        self._unreported: dict[int, Sequence] = {}  # those of which nothing was sent yet

    def began(self, submission: Submission) -> None:
        self._submission = submission
        self._unreported = {sequence.client.index: sequence for sequence in submission.sequences}
        self._open = len(submission.sequences) + sum(each.save_to is not None for each in submission.sequences)

    def put(self, index: int, delta: Delta) -> None:
        if index in self._ahead:
            self._drop_received(self._ahead[index], delta)
        cached = self._unreported.pop(index).prefix.cached if index in self._unreported else 0
        self._connection.gained(self._number, index, cached, delta)
        if ends := delta.ends:
            self._open -= ends
            if not self._open:
                self._connection.drop(self._number)

    def abandon(self) -> None:
        if self._submission is not None:
            self._submission.abandon()

    @staticmethod
    def _drop_received(ahead: list[int], delta: Delta) -> None:
        """Removes from `delta`, which has at most one token, what the front end has received before."""
        tokens, characters, logprobs = ahead
        if delta.tokens and tokens:
            delta.tokens, delta.logprob, delta.neurons, ahead[0] = [], 0.0, None, tokens - 1
        cut = min(characters, len(delta.text))
        delta.text, ahead[1] = delta.text[cut:], characters - cut
        if delta.logprobs and logprobs:
            cut = min(logprobs, len(delta.logprobs))
            delta.logprobs, ahead[2] = delta.logprobs[cut:], logprobs - cut


class Connection(asyncio.Protocol):
    """The connection of one front end."""

    def __init__(self, port: EnginePort) -> None:
        self._port = port
        self._unpacker = Unpacker(FromFront)
        self._loop = asyncio.get_running_loop()
        self.streams: dict[int, Stream] = {}
        self._authenticated = False
        self._gains: list[Gain] = []
        self._merged: dict[tuple[int, int], tuple[Gathering, int]] = {}
        self._slow = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=BUFFER)
        reason = f"it sent no Hello within {GREETING_SECONDS:g} s"
        self._timer = self._loop.call_later(GREETING_SECONDS, self._refuse, reason)
        self._port.receive(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._port.connections.discard(self)
        self._port.guests.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        for stream in self.streams.values():
            stream.abandon()
        self.streams.clear()
        self._port.streams_changed()

    def pause_writing(self) -> None:
        self._slow = True

    def resume_writing(self) -> None:
        self._slow = False
        merged, self._merged = self._merged, {}
        self._gains += [Gain(*key, cached, gathering.whole()) for key, (gathering, cached) in merged.items()]
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unpacker.feed(data):
                self._take(message)
        except Malformed as error:
            self._refuse(str(error))

    def drop(self, number: int) -> Stream | None:
        """Forgets the stream of that number and returns it; None where it has ended already."""
        stream = self.streams.pop(number, None)
        self._port.streams_changed()
        return stream

    def send(self, message: object) -> None:
        self._transport.write(frame(message))

    def close(self) -> None:
        self._transport.close()

    def disconnect(self) -> None:
        """Closes the connection at once, without sending what is buffered."""
        self._transport.abort()

    def gained(self, stream: int, index: int, cached: int, delta: Delta) -> None:
        """Sends a `Gain` together with the others of its step, or merges it where the front end is slow."""
        if self._slow:
            gathering, _ = self._merged.setdefault((stream, index), (Gathering(), cached))
            gathering.add(delta)
            return
        if not self._gains:
            self._loop.call_soon(self._flush)
        self._gains.append(Gain(stream, index, cached, delta))

    def _flush(self) -> None:
        gains, self._gains = self._gains, []
        if gains and not self._transport.is_closing():
            self.send(Gains(gains))

    def _take(self, message: FromFront) -> None:
        if not self._authenticated:
            self._greet(message)
        elif isinstance(message, Start):
            stream = self.streams[message.stream] = Stream(self, message)
            self._port.streams_changed()
            task = self._loop.create_task(self._start(message, stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Abort):
            if (ended := self.drop(message.stream)) is not None:
                ended.abandon()
        else:
            raise Malformed("it sent a second Hello")

    def _greet(self, message: FromFront) -> None:
        if not isinstance(message, Hello):
            raise Malformed("its first message is no Hello")
        version = self._port.welcome.version
        if (message.protocol, message.version) != (PROTOCOL, version):
            raise Malformed(f"its version is {message.version}, and the engine's is {version}")
        if not hmac.compare_digest(message.secret.encode(), self._port.secret.encode()):
            raise Malformed("its secret is wrong")
        self._authenticated, self._unpacker.most = True, MOST_BYTES
        self._port.guests.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        self.send(self._port.welcome)
        self._beat()

    def _beat(self) -> None:
        if not self._slow:  # else it has not even read the last messages
            self.send(self._port.state())
        self._timer = self._loop.call_later(self._port.heartbeat_seconds, self._beat)

    def _refuse(self, reason: str) -> None:
        reason = reason[:200]  # the peer's words may be in it: no line of the log is theirs
        log.warning("a connection to the engine is refused: %s", reason if reason.isprintable() else repr(reason))
        self.send(Refusal(reason))
        self._transport.close()

    async def _start(self, message: Start, stream: Stream) -> None:
        try:
            request = message.whole
            if isinstance(request.grammar, GrammarText):
                request = replace(request, grammar=await self._port.grammars.compiled(request.grammar))
            submission = await self._port.backend.submit(request, stream, message.progress)
        except BDHError as error:
            self._ended(message.stream, error)
        except Exception:
            id = message.request.origin.id
            log.exception("request %s could not be started", id, extra={"fields": {"request_id": id}})
            self._ended(message.stream, GenerationFailed("The request could not be started."))
        else:
            stream.began(submission)
            if message.stream not in self.streams:  # aborted meanwhile
                stream.abandon()
            self.send(Started(message.stream))

    def _ended(self, stream: int, error: BDHError) -> None:
        if self.drop(stream) is not None:
            self.send(Started(stream, error))
