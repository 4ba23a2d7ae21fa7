"""Finds another engine for streams that have lost theirs, and finds out which of them engines die of.

What an engine dies of is in the step that it computes, and has had no token of it: any other has proven to be harmless.
Those are suspects. All other streams of that engine go on at once; then the suspects are on trial, one at a time on
each engine, until they have a token there, and nobody new begins meanwhile: if that engine dies, too, it is known of
which. Where engines have also died with no suspect in their step, somebody kills them, and a suspect may only have been
there: then it takes more engines to tell.
Streams of an engine that is replaced are not suspected of anything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from bdh_batch.backends.replica import Replica, State
from bdh_batch.backends.stream import RemoteStream
from bdh_batch.errors import GenerationFailed, RunTimeout
from bdh_batch.messages import GenerationRequest

log = logging.getLogger(__name__)

MORE = 2  # engines that a suspect may lose where some die of something else
REMEMBERED_SECONDS = 300.0  # that such a death is remembered
REFUSED_SECONDS = 0.05  # until an engine that refuses for going down may have said so


class Failover:
    """Keeps the streams that wait for an engine, and those that are on trial.

    Args:
        most: engines in a row that one stream may lose without a token; then it fails.
        ready: the replicas that compute.
        choose: one of them for a request.
    """

    def __init__(
        self,
        most: int,
        ready: Callable[[], Sequence[Replica]],
        choose: Callable[[GenerationRequest], Replica | None],
    ) -> None:
        self.waiting: dict[RemoteStream, asyncio.TimerHandle | None] = {}
        self._most = most
        self._ready = ready
        self._choose = choose
        self._on_trial: dict[Replica, RemoteStream] = {}
        self._unexplained = -math.inf  # when an engine last died with nobody in its step that had no token yet

    def enter(self, stream: RemoteStream) -> None:
        """A new one."""
        self._wait(stream)
        self.dispatch()

    def lost(self, replica: Replica, streams: Sequence[RemoteStream]) -> None:
        """`replica` is gone, hangs, or is being replaced."""
        self._on_trial.pop(replica, None)
        suspects = () if replica.state is State.LEAVING else replica.in_step
        now = time.monotonic()
        if replica.state is not State.LEAVING and not suspects:
            self._unexplained = now
        most = self._most + (MORE if now - self._unexplained < REMEMBERED_SECONDS else 0)
        for stream in streams:
            stream.lost()
            stream.failovers += stream.request.origin.id in suspects
            if stream.ended:
                continue
            if stream.failovers < most:
                log.warning("request %s goes on elsewhere", stream.request.origin.id)
                self._wait(stream)
                continue
            log.error("request %s has lost %d engines, and is given up", stream.request.origin.id, stream.failovers)
            stream.fail(GenerationFailed("The engines that computed this request were lost."))
        self.dispatch()

    def refused(self, stream: RemoteStream, replica: Replica) -> None:
        """`replica` goes down, and has not begun with `stream`."""
        self._acquit(stream)
        self._wait(stream)
        asyncio.get_running_loop().call_later(REFUSED_SECONDS, self.dispatch)

    def proved(self, stream: RemoteStream) -> None:
        """`stream` has had a token."""
        self._acquit(stream)
        self.dispatch()

    def forget(self, stream: RemoteStream) -> None:
        """`stream` has ended. Idempotent."""
        timer = self.waiting.pop(stream, None)
        if timer is not None:
            timer.cancel()
        self._acquit(stream)
        self.dispatch()

    def dispatch(self) -> None:
        """Sends what waits to the engines that there are."""
        if not self.waiting:
            return
        for stream in [each for each in self.waiting if not each.failovers and each.admitted.done()]:
            self._send_somewhere(stream)
        suspects = sorted((each for each in self.waiting if each.failovers), key=lambda each: each.tokens)
        for replica in self._ready() if suspects else ():
            if suspects and all(reader.proven for reader in replica.readers.values()):
                stream = self._on_trial[replica] = suspects.pop()
                self._send(stream, replica)
        if suspects or self._on_trial:
            return
        for stream in [*self.waiting]:
            self._send_somewhere(stream)

    def _send_somewhere(self, stream: RemoteStream) -> None:
        if (replica := self._choose(stream.request)) is not None:
            self._send(stream, replica)

    def _send(self, stream: RemoteStream, replica: Replica) -> None:
        timer = self.waiting.pop(stream)
        if timer is not None:
            timer.cancel()
        stream.send_to(replica)

    def _wait(self, stream: RemoteStream) -> None:
        timer = None
        if stream.deadline is not None:
            left = max(0.0, stream.deadline - time.monotonic())
            end = partial(stream.fail, RunTimeout("The request's time was up while it waited for an engine."))
            timer = asyncio.get_running_loop().call_later(left, end)
        self.waiting[stream] = timer

    def _acquit(self, stream: RemoteStream) -> None:
        """If `stream` was on trial, it is so no longer."""
        for replica in [replica for replica, suspect in self._on_trial.items() if suspect is stream]:
            del self._on_trial[replica]
