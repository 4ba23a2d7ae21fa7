"""An engine process's side of its connections: front ends come, start streams, and get what those gain.

What a step's sequences gained goes to each front end in one message, however many they are. Where a front end reads
slower than that, what its sequences gain is merged until it has caught up.
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
    Ask,
    FromFront,
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
    packed_error,
)
from bdh_batch.engine.worker import Load
from bdh_batch.errors import BDHError, GenerationFailed
from bdh_batch.messages import Delta, Gathering, Grammar, GrammarText

log = logging.getLogger(__name__)

GREETING_SECONDS = 5.0
BUFFER = 2**22  # bytes on their way to a front end, from which on what its sequences gain is merged


class Compiles(Protocol):
    """Compiles grammars that a front end has tried out: `text.grammar.Grammars`."""

    def compiled(self, text: GrammarText) -> Awaitable[Grammar]: ...


class EnginePort:
    """Serves a backend to front ends.

    Args:
        welcome: what it says of itself.
        secret: that front ends have to know.
        pulse: seconds between two signs of life.
        metrics: as Prometheus reads them.
    """

    def __init__(
        self,
        backend: LocalBackend,
        grammars: Compiles,
        welcome: Welcome,
        secret: str,
        pulse: float,
        load: Callable[[], Load],
        metrics: Callable[[], bytes],
    ) -> None:
        self.backend = backend
        self.grammars = grammars
        self.welcome = welcome
        self.secret = secret
        self.pulse = pulse
        self.metrics = metrics
        self._load = load
        self.links: set[Link] = set()
        self.idle = asyncio.Event()  # no stream is left
        self.idle.set()
        self._leaving = False

    def link(self) -> asyncio.Protocol:
        """For a new connection."""
        return Link(self)

    def leave(self) -> None:
        """From now on front ends are asked to go on elsewhere."""
        self._leaving = True
        for link in [*self.links]:
            link.send(self.state())

    def streams_changed(self) -> None:
        """One has begun or ended."""
        (self.idle.clear if any(link.streams for link in self.links) else self.idle.set)()

    def state(self) -> Pulse:
        load = self._load()
        return Pulse(load.running, load.waiting, self.backend.health(), self._leaving)

    def close(self) -> None:
        for link in [*self.links]:
            link.close()


class Stream:
    """A front end's request while it runs: the outbox of its sequences.

    What its reader has had of them elsewhere, it is not sent again.
    """

    def __init__(self, link: Link, start: Start) -> None:
        self._link = link
        self._number = start.stream
        self._ahead = {
            index: [each.ahead, each.characters, each.scores]
            for index, each in enumerate(start.progress)
            if each.ahead or each.characters or each.scores
        }
        self._open = 0
        self._submission: Submission | None = None

    def began(self, submission: Submission) -> None:
        self._submission = submission
        self._open = len(submission.sequences)

    def put(self, index: int, delta: Delta) -> None:
        assert self._submission is not None
        if index in self._ahead:
            self._leave_out(self._ahead[index], delta)
        self._link.gained(self._number, index, delta, self._submission.cached_of(index))
        if delta.finish_reason is not None:
            self._open -= 1
            if not self._open:
                self._link.drop(self._number)

    def abandon(self) -> None:
        if self._submission is not None:
            self._submission.abandon()

    @staticmethod
    def _leave_out(ahead: list[int], delta: Delta) -> None:
        """Takes out of `delta`, which has one token at most, what its reader has had."""
        tokens, characters, scores = ahead
        if delta.tokens and tokens:
            delta.tokens, delta.logprob, ahead[0] = [], 0.0, tokens - 1
        cut = min(characters, len(delta.text))
        delta.text, ahead[1] = delta.text[cut:], characters - cut
        if delta.scores and scores:
            cut = min(scores, len(delta.scores))
            delta.scores, ahead[2] = delta.scores[cut:], scores - cut


class Link(asyncio.Protocol):
    """A connection of a front end."""

    def __init__(self, port: EnginePort) -> None:
        self._port = port
        self._unpacker = Unpacker(FromFront)
        self._loop = asyncio.get_running_loop()
        self.streams: dict[int, Stream] = {}
        self._known = False  # whether it has said the secret
        self._gains: list[Gain] = []
        self._merged: dict[tuple[int, int], tuple[Gathering, int]] = {}
        self._slow = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=BUFFER)
        self._timer = self._loop.call_later(GREETING_SECONDS, self._refuse, "it has not said who it is")
        self._port.links.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._port.links.discard(self)
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
        self._gains = [Gain.of(*key, gathering.whole(), cached) for key, (gathering, cached) in merged.items()]
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._unpacker.feed(data):
                self._take(message)
        except Malformed as error:
            self._refuse(str(error))

    def drop(self, number: int) -> Stream | None:
        """The stream of that number ends here; None where it has ended."""
        stream = self.streams.pop(number, None)
        self._port.streams_changed()
        return stream

    def send(self, message: object) -> None:
        self._transport.write(frame(message))

    def close(self) -> None:
        self._transport.close()

    def cut(self) -> None:
        """Ends the connection at once; what is on its way is lost."""
        self._transport.abort()

    def gained(self, stream: int, index: int, delta: Delta, cached: int) -> None:
        """
        Args:
            cached: tokens of its prompt that did not have to be computed.
        """
        if self._slow:
            gathering, _ = self._merged.setdefault((stream, index), (Gathering(), cached))
            gathering.add(delta)
            return
        if not self._gains:
            self._loop.call_soon(self._flush)
        self._gains.append(Gain.of(stream, index, delta, cached))

    def _flush(self) -> None:
        gains, self._gains = self._gains, []
        if gains and not self._transport.is_closing():
            self.send(Gains(gains))

    def _take(self, message: FromFront) -> None:
        if not self._known:
            self._greet(message)
        elif isinstance(message, Start):
            task = self._loop.create_task(self._start(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Abort):
            if (stream := self.drop(message.stream)) is not None:
                stream.abandon()
        elif isinstance(message, Ask):
            self.send(Told(message.number, self._port.metrics()))
        else:
            raise Malformed("it has greeted twice")

    def _greet(self, message: FromFront) -> None:
        if not isinstance(message, Hello):
            raise Malformed("it has not said who it is")
        version = self._port.welcome.version
        if (message.protocol, message.version) != (PROTOCOL, version):
            raise Malformed(f"it is of version {message.version}, this one of {version}")
        if not hmac.compare_digest(message.secret.encode(), self._port.secret.encode()):
            raise Malformed("it does not know the secret")
        self._known, self._unpacker.most = True, MOST_BYTES
        if self._timer is not None:
            self._timer.cancel()
        self.send(self._port.welcome)
        self._beat()

    def _beat(self) -> None:
        if not self._slow:  # else it has enough to read
            self.send(self._port.state())
        self._timer = self._loop.call_later(self._port.pulse, self._beat)

    def _refuse(self, reason: str) -> None:
        log.warning("a connection to the engine is refused: %s", reason)
        self.send(Refusal(reason[:200]))
        self._transport.close()

    async def _start(self, message: Start) -> None:
        stream = self.streams[message.stream] = Stream(self, message)
        self._port.streams_changed()
        try:
            request = message.whole
            if isinstance(request.grammar, GrammarText):
                request = replace(request, grammar=await self._port.grammars.compiled(request.grammar))
            submission = await self._port.backend.submit(request, stream, message.progress)
        except BDHError as error:
            self._ended(message.stream, error)
        except Exception:
            log.exception("request %s could not be started", message.request.origin.id)
            self._ended(message.stream, GenerationFailed("The request could not be started."))
        else:
            stream.began(submission)
            if message.stream not in self.streams:  # aborted meanwhile
                stream.abandon()
            self.send(Started(message.stream))

    def _ended(self, stream: int, error: BDHError) -> None:
        if self.drop(stream) is not None:
            self.send(Started(stream, packed_error(error)))
