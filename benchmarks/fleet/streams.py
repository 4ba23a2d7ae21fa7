"""What stands in for the server's connections: an engine as an ingress process sees it, and a request on its way."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence as Many
from typing import cast

from bdh_batch.backends import routing
from bdh_batch.backends.failover import Failover
from bdh_batch.backends.outstanding import Outstanding
from bdh_batch.backends.replica import Replica, State
from bdh_batch.backends.stream import RemoteStream
from bdh_batch.errors import BDHError
from bdh_batch.messages import GenerationRequest


class View:
    """An engine as an ingress process sees it: the part of `backends.replica.Replica` that routing and failover use."""

    __slots__ = ("address", "in_step", "number", "outstanding", "readers", "state")

    def __init__(self, number: int) -> None:
        self.number = number
        self.address = f"engine {number}"
        self.state = State.READY
        self.readers: dict[int, Stream] = {}
        self.outstanding = Outstanding()
        self.in_step: Collection[str] = ()

    def add(self, stream: Stream) -> None:
        self.readers[stream.key] = stream
        self.outstanding.begin(stream.request.origin.tenant)

    def drop(self, stream: Stream) -> None:
        del self.readers[stream.key]
        self.outstanding.end(stream.request.origin.tenant)

    def report(self, load: int, prompt_tokens: int) -> None:
        """A heartbeat has come."""
        self.outstanding.report(load, prompt_tokens)

    def lose(self) -> list[Stream]:
        """The connection is lost: returns the streams that were sent over it."""
        streams = [*self.readers.values()]
        self.readers.clear()
        self.outstanding = Outstanding()
        return streams


class Stream:
    """One request: the part of `backends.stream.RemoteStream` that failover uses, and what came of it.

    Args:
        send: sends it to the engine of a view.
        fail: is called where it ends with an error.
    """

    def __init__(
        self,
        key: int,
        request: GenerationRequest,
        arrived: float,
        send: Callable[[Stream, View], None],
        fail: Callable[[Stream], None],
    ) -> None:
        self.key, self.request, self.arrived = key, request, arrived
        self._send, self._fail = send, fail
        self.admitted = Admitted()
        self.deadline = None
        self.failovers = 0
        self.has_token = self.confirmed = self.ended = False
        self.view: View | None = None
        self.tokens = 0  # that its reader has
        self.first: float | None = None  # seconds at which its reader got its tokens
        self.last = arrived
        self.times: list[float] = []  # seconds, each time that it got tokens
        self.pauses: list[float] = []  # seconds from the last token before a loss to the next one
        self.work = Work()
        self.waits = False  # for the first token after a loss

    def send_to(self, view: View) -> None:
        self.has_token = self.confirmed = False
        self.view = view
        self._send(self, view)

    def taken(self) -> None:
        """An engine has started it."""
        self.confirmed = self.admitted.is_done = True

    def lost(self) -> None:
        self.view = None

    def fail(self, error: BDHError) -> None:
        self._fail(self)

    def gained(self, tokens: int, now: float) -> bool:
        """Takes tokens; returns whether these are the first of the engine that computes it now."""
        if self.first is None:
            self.first = now
        elif self.waits:
            self.pauses.append(now - self.last)
        self.waits = False
        self.tokens += tokens
        self.last = now
        self.times.append(now)
        first, self.has_token = not self.has_token, True
        if first:
            self.failovers = 0
        return first


class Admitted:
    """Whether an engine has ever started a stream; stands in for a future."""

    is_done = False

    def done(self) -> bool:
        return self.is_done


class Work:
    """What engines computed for one request, in tokens.

    For a request that has ended, `computed + cached` is what its state has read, and `lost`.
    """

    __slots__ = ("cached", "computed", "losses", "lost", "reached", "recomputed")

    def __init__(self) -> None:
        self.computed = 0  # by all engines
        self.cached = 0  # that they began behind
        self.losses = 0
        self.lost = 0  # in states that were lost
        self.recomputed = 0  # computed, though an engine before had come as far
        self.reached = 0  # the longest state so far

    def add(self, computed: int, cached: int, lost: bool) -> None:
        """An engine has computed so many tokens behind `cached` ones, and has ended it, or was `lost`."""
        length = computed + cached
        self.computed += computed
        self.cached += cached
        self.recomputed += max(0, min(self.reached, length) - cached)
        self.reached = max(self.reached, length)
        if lost:
            self.losses += 1
            self.lost += length


# Rules of routing

Choose = Callable[[Many[Replica], GenerationRequest], Replica | None]
Rule = Callable[[Many[View], GenerationRequest], View | None]


def affinity(draw: random.Random) -> Rule:
    """The server's own."""
    return routing.Routing(draw).choose


def least_loaded(draw: random.Random) -> Rule:
    """The server's own, without prefixes."""
    return lambda ready, request: routing.least_loaded(ready, request.origin.tenant, draw) if ready else None


def at_random(draw: random.Random) -> Rule:
    return lambda ready, request: draw.choice(ready) if ready else None


def round_robin(draw: random.Random) -> Rule:
    turn = draw.randrange(1 << 20)

    def choose(ready: Many[View], request: GenerationRequest) -> View | None:
        nonlocal turn
        turn += 1
        return ready[turn % len(ready)] if ready else None

    return choose


RULES: dict[str, Callable[[random.Random], Rule]] = {
    "affinity": affinity,
    "least loaded": least_loaded,
    "random": at_random,
    "round robin": round_robin,
}


class Ingress:
    """An ingress process: one view of each engine, and the server's own failover."""

    def __init__(self, engines: int, rule: Rule, max_failovers: int, clock: Callable[[], float]) -> None:
        self.views = [View(number) for number in range(engines)]
        self.ready = [*self.views]
        self.failover = Failover(max_failovers, lambda: cast(Many[Replica], self.ready), cast(Choose, rule), clock)

    def add(self, stream: Stream) -> None:
        self.failover.add(cast(RemoteStream, stream))

    def has_token(self, stream: Stream) -> None:
        self.failover.on_first_token(cast(RemoteStream, stream))

    def ended(self, stream: Stream) -> None:
        if stream.view is not None:
            stream.view.drop(stream)
            stream.view = None
        self.failover.forget(cast(RemoteStream, stream))

    def lost(self, number: int) -> None:
        """The connection to an engine is lost."""
        view = self.views[number]
        streams = view.lose()
        self._enter(view, State.CONNECTING)
        if streams:
            self.failover.lost(cast(Replica, view), cast(Many[RemoteStream], streams))

    def connected(self, number: int) -> None:
        """An engine is there again."""
        self.views[number].in_step = ()
        self._enter(self.views[number], State.READY)

    def _enter(self, view: View, state: State) -> None:
        view.state = state
        self.ready = [each for each in self.views if each.state is State.READY]
        self.failover.dispatch()
