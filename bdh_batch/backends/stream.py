"""A request on its way through engine processes: what has come of it, and where it is computed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from bdh_batch.backends.replica import Replica
from bdh_batch.backends.wire import Gain, Start
from bdh_batch.engine.mailbox import Mailbox
from bdh_batch.errors import BDHError, Unavailable
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Progress


class Keeper(Protocol):
    """Whoever finds an engine for streams: `failover.Failover`."""

    def proved(self, stream: RemoteStream) -> None:
        """It has had a token, or its end, of the engine that computes it now."""

    def refused(self, stream: RemoteStream, replica: Replica) -> None:
        """That engine goes down."""

    def forget(self, stream: RemoteStream) -> None:
        """It has ended, or is read no more. Idempotent."""


class Track:
    """What is known of one sequence, by whoever would have another engine go on with it.

    With logprobs, some may wait for the text of their tokens, and are known to the engine alone. So what another one is
    given ends where none waits: where as many have come as tokens. What came after that comes again.
    """

    __slots__ = ("cached", "certain", "ended", "scored", "since", "tokens")

    def __init__(self, scored: bool) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self.cached = 0
        self.scored = scored
        self.certain = 0  # tokens that another engine is given
        self.since = [0, 0]  # characters and logprobs that came after those

    def take(self, gain: Gain) -> None:
        """What came from an engine."""
        self.tokens += gain.tokens
        self.cached = max(self.cached, gain.cached_tokens)
        self.ended = gain.finish_reason is not None
        self.since[0] += len(gain.text)
        self.since[1] += len(gain.scores or ())
        if not self.scored or self.certain + self.since[1] == len(self.tokens):
            self.certain, self.since = len(self.tokens), [0, 0]

    @property
    def progress(self) -> Progress:
        ahead = len(self.tokens) - self.certain
        return Progress(self.tokens[: self.certain], self.ended, ahead, *self.since)


class RemoteStream:
    """A request on its way through engines: the source of a generation.

    Args:
        deadline: on the monotonic clock, when its time is up.

    `failovers` counts the engines that it has lost since it last had a token; `proven` says whether it has had one of
    the engine that computes it now.
    """

    def __init__(self, request: GenerationRequest, mailbox: Mailbox, keeper: Keeper, deadline: float | None) -> None:
        scored = request.sampling is not None and request.sampling.logprobs is not None
        self.request = request
        self.tracks = [Track(scored) for _ in range(len(request.prompts) * request.n)]
        self.deadline = deadline
        self.failovers = 0
        self.proven = False
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._mailbox = mailbox
        self._keeper = keeper
        self._at: tuple[Replica, int] | None = None

    @property
    def cached_tokens(self) -> Sequence[int]:
        return [track.cached for track in self.tracks]

    @property
    def tokens(self) -> int:
        return sum(len(track.tokens) for track in self.tracks)

    @property
    def ended(self) -> bool:
        return all(track.ended for track in self.tracks)

    def send_to(self, replica: Replica) -> None:
        self.proven = False
        self._at = replica, replica.start(self, self._start)

    def started(self, replica: Replica, error: BDHError | None) -> None:
        if error is None:
            if not self.admitted.done():
                self.admitted.set_result(None)
        elif isinstance(error, Unavailable):  # it has gone down: as if it were lost
            self._at = None
            self._keeper.refused(self, replica)
        else:
            self.fail(error)

    def gained(self, gain: Gain) -> None:
        track = self.tracks[gain.index]
        if track.ended:
            return
        if track.tokens:
            gain.prompt_scores = None  # they came with the first
        if gain.tokens or gain.text or gain.finish_reason or gain.scores or gain.prompt_scores:
            track.take(gain)
            self._mailbox.put(gain.index, gain.delta)
        if not self.proven:
            self.proven, self.failovers = True, 0
            self._keeper.proved(self)
        if track.ended and self.ended:
            self.abandon()

    def lost(self) -> None:
        """Nothing more comes from where it was."""
        self._at = None

    def fail(self, error: BDHError) -> None:
        """Ends what has not ended."""
        if not self.admitted.done():
            self.admitted.set_exception(error)
        for index, track in enumerate(self.tracks):
            if not track.ended:
                track.ended = True
                self._mailbox.put(index, Delta(finish_reason=FinishReason.ERROR, error=error))
        self.abandon()

    def abandon(self) -> None:
        at, self._at = self._at, None
        if at is not None:
            replica, stream = at
            replica.abort(stream)
        self._keeper.forget(self)

    def _start(self, number: int) -> Start:
        request = self.request
        if self.deadline is not None:
            timeout = max(0.001, self.deadline - time.monotonic())
            request = replace(request, origin=replace(request.origin, timeout=timeout))
        progress = [track.progress for track in self.tracks] if self.admitted.done() else []
        return Start.of(number, request, progress)
