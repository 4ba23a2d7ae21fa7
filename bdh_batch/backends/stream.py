"""The stream of a request that engine processes compute: its progress, and the engine that computes it now."""

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


class Dispatcher(Protocol):
    """Finds engines for streams: `failover.Failover`."""

    def on_first_token(self, stream: RemoteStream) -> None:
        """Is called when the engine that computes the stream now has sent its first delta of it."""

    def refused(self, stream: RemoteStream) -> None:
        """Is called when an engine refuses the stream as it is shutting down."""

    def forget(self, stream: RemoteStream) -> None:
        """Is called when the stream has ended, or nobody reads it any more. Idempotent."""


class SequenceRecord:
    """What has been received of one sequence, from which another engine can resume it.

    Logprobs may wait in the engine for the text of their tokens. So a sequence with logprobs is resumed at a token
    where none waits: where as many logprobs have been received as tokens. What came after that is computed again.
    """

    __slots__ = ("cached", "ended", "has_logprobs", "resumable", "since", "tokens")

    def __init__(self, has_logprobs: bool) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self.cached = 0
        self.has_logprobs = has_logprobs
        self.resumable = 0  # tokens that another engine gets
        self.since = [0, 0]  # characters and logprobs that were received after those

    def take(self, delta: Delta, cached: int) -> None:
        """Adds a delta from an engine, and how many tokens of the prompt that has taken from a cached prefix."""
        self.tokens += delta.tokens
        self.cached = max(self.cached, cached)
        self.ended = delta.finish_reason is not None
        self.since[0] += len(delta.text)
        self.since[1] += len(delta.logprobs or ())
        if not self.has_logprobs or self.resumable + self.since[1] == len(self.tokens):
            self.resumable, self.since = len(self.tokens), [0, 0]

    @property
    def progress(self) -> Progress:
        """The part of a `Start` message that says where to resume the sequence."""
        ahead = len(self.tokens) - self.resumable
        return Progress(self.tokens[: self.resumable], self.ended, ahead, *self.since)


class RemoteStream:
    """A request that is computed by one engine after the other: the source of a generation.

    Args:
        deadline: when it times out, on the monotonic clock; None is never.

    `failovers` counts the engines that it has lost without having received something new of each of its sequences.
    `has_token` says whether the engine that computes it now has sent that, `confirmed` whether it has started it.
    `admitted` is done once an engine has started it, or it has failed.
    """

    def __init__(
        self, request: GenerationRequest, mailbox: Mailbox, dispatcher: Dispatcher, deadline: float | None
    ) -> None:
        has_logprobs = request.sampling is not None and request.sampling.logprobs is not None
        self.request = request
        self.records = [SequenceRecord(has_logprobs) for _ in range(len(request.prompts) * request.n)]
        self.deadline = deadline
        self.failovers = 0
        self.has_token = False
        self.confirmed = False
        self._saving = request.save_to is not None  # and what became of it is not known yet
        self._silent: set[int] = set()  # sequences of which the engine has sent nothing new yet
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._mailbox = mailbox
        self._dispatcher = dispatcher
        self._at: tuple[Replica, int] | None = None

    @property
    def id(self) -> str:
        return self.request.origin.id

    @property
    def tenant(self) -> str:
        return self.request.origin.tenant

    @property
    def cached_tokens(self) -> Sequence[int]:
        return [record.cached for record in self.records]

    @property
    def tokens(self) -> int:
        return sum(len(record.tokens) for record in self.records)

    @property
    def ended(self) -> bool:
        return not self._saving and all(record.ended for record in self.records)

    def send_to(self, replica: Replica) -> None:
        self.has_token = self.confirmed = False
        self._silent = {index for index, record in enumerate(self.records) if not record.ended}
        self._at = replica, replica.start(self, self._start)

    def started(self, replica: Replica, error: BDHError | None) -> None:
        if error is None:
            self.confirmed = True
            if not self.admitted.done():
                self.admitted.set_result(None)
        elif isinstance(error, Unavailable):  # the engine is shutting down: as if it were lost
            self._at = None
            self._dispatcher.refused(self)
        else:
            self.fail(error)

    def gained(self, gain: Gain) -> None:
        record, delta = self.records[gain.index], gain.delta
        if record.ended:
            self._take_saved(gain)
            return
        if isinstance(delta.error, Unavailable):  # the engine has gone down, though its process has not
            self._leave()
            self._dispatcher.refused(self)
            return
        if record.tokens:
            delta.prompt_logprobs = None  # they came with the first token
        if delta.tokens or delta.text or delta.finish_reason or delta.logprobs or delta.prompt_logprobs:
            record.take(delta, gain.cached_tokens)
            self._mailbox.put(gain.index, delta)
            self._silent.discard(gain.index)
        if not (self.has_token or self._silent):
            self.has_token, self.failovers = True, 0
            self._dispatcher.on_first_token(self)
        self._saving = self._saving and delta.ends < 2
        if record.ended and self.ended:
            self.abandon()

    def lost(self) -> None:
        """Forgets the engine, from which nothing more will come."""
        self._at = None
        self._give_up_saving("The engine that wrote the state was lost.")

    def fail(self, error: BDHError) -> None:
        """Ends all sequences that have not ended with `error`."""
        if not self.admitted.done():
            self.admitted.set_exception(error)
        self._end(Delta(finish_reason=FinishReason.ERROR, error=error))

    def abandon(self) -> None:
        self._end(Delta(finish_reason=FinishReason.ABORT))  # its reader may wait for the next one

    def _end(self, last: Delta) -> None:
        """Ends all sequences that have not ended with `last`."""
        self._leave()
        self._dispatcher.forget(self)
        for index, record in enumerate(self.records):
            if not record.ended:
                record.ended = True
                self._mailbox.put(index, last.replaced())
        self._give_up_saving("The response is not complete.")

    def _take_saved(self, gain: Gain) -> None:
        """What became of the state of the first sequence, which has ended."""
        if self._saving and gain.delta.ends:
            self._saving = False
            self._mailbox.put(gain.index, gain.delta)
            if self.ended:
                self.abandon()

    def _give_up_saving(self, why: str) -> None:
        """Nothing will be known of the state any more, where the first sequence has ended."""
        if self._saving and self.records[0].ended:
            self._saving = False
            self._mailbox.put(0, Delta(save_error=why))

    def _leave(self) -> None:
        self._give_up_saving("The engine that wrote the state was left.")
        at, self._at = self._at, None
        if at is not None:
            replica, stream = at
            replica.abort(stream)

    def _start(self, number: int) -> Start:
        request = self.request
        if self.deadline is not None:
            timeout = max(0.001, self.deadline - time.monotonic())
            request = replace(request, origin=replace(request.origin, timeout=timeout))
        if not self.admitted.done():
            return Start.of(number, request, [])
        if self.tokens:  # it has begun, and is not refused any more if the file of its state has gone
            request = replace(request, state_optional=True)
        progress = [record.progress for record in self.records]
        return Start.of(number, request, progress)
