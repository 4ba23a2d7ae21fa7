"""Moves streams to another engine when theirs is lost, and finds out which request crashes engines.

Only a request in the engine's last step that had no token of it yet can be what crashed it. Those requests are
suspects. All other streams of that engine are resumed at once. Then the suspects are probed: each engine computes one
of them at a time until it has a token, and no request without a token starts there meanwhile. So if that engine
crashes, too, the request that did it is known. While suspects wait for engines, no new request starts anywhere.

Where engines have also crashed with no suspect in their step, something else kills them, and a suspect may only have
been present: then it takes more engines to tell. Streams of an engine that is replaced are no suspects.
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

MORE = 2  # engines that a suspect may lose in addition where some crash for another reason
REMEMBERED_SECONDS = 300.0  # for which such a crash is remembered
REFUSED_SECONDS = 0.05  # until the heartbeat of an engine that refuses as it is shutting down may have come


class Failover:
    """Dispatches streams to engines: new ones, those whose engine is lost, and suspects.

    Args:
        max_failovers: engines in a row that one stream may lose without a token; then it fails.
        ready: returns the replicas that are ready.
        choose: returns the one of some replicas that should compute a request; None where there are none.
        clock: the seconds of now, of no certain beginning.

    `waiting` contains the streams that wait for an engine, each with the timer of its deadline.
    """

    def __init__(
        self,
        max_failovers: int,
        ready: Callable[[], Sequence[Replica]],
        choose: Callable[[Sequence[Replica], GenerationRequest], Replica | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.waiting: dict[RemoteStream, asyncio.TimerHandle | None] = {}
        self._max_failovers = max_failovers
        self._ready = ready
        self._choose = choose
        self._clock = clock
        self._probes: dict[Replica, RemoteStream] = {}
        self._unexplained = -math.inf  # when an engine last crashed without a suspect in its step

    def add(self, stream: RemoteStream) -> None:
        """Dispatches a new stream."""
        self._wait(stream)
        self.dispatch()

    def lost(self, replica: Replica, streams: Sequence[RemoteStream]) -> None:
        """Moves `streams` to other engines, as `replica` has crashed, hangs, or is being replaced."""
        self._probes.pop(replica, None)
        leaving, now = replica.state is State.LEAVING, self._clock()
        suspects = () if leaving else replica.in_step
        if not (leaving or suspects or any(not stream.confirmed for stream in streams)):
            self._unexplained = now
        most = self._max_failovers + (MORE if now - self._unexplained < REMEMBERED_SECONDS else 0)
        for stream in streams:
            stream.lost()
            # One that was not even started may have crashed the engine before its first step.
            stream.failovers += stream.request.origin.id in suspects or not (leaving or stream.confirmed)
            if stream.ended:
                continue
            id = stream.request.origin.id
            fields = {"fields": {"request_id": id}}
            if stream.failovers < most:
                log.warning("request %s is resumed on another engine", id, extra=fields)
                self._wait(stream)
                continue
            log.error("request %s failed: it has lost %d engines", id, stream.failovers, extra=fields)
            stream.fail(GenerationFailed("The engines that computed this request crashed."))
        self.dispatch()

    def refused(self, stream: RemoteStream) -> None:
        """Has `stream` wait for another engine, as the one that had it is shutting down."""
        self._end_probe(stream)
        self._wait(stream)
        asyncio.get_running_loop().call_later(REFUSED_SECONDS, self.dispatch)

    def on_first_token(self, stream: RemoteStream) -> None:
        """Ends the probe of `stream`, if it was a suspect."""
        self._end_probe(stream)
        self.dispatch()

    def forget(self, stream: RemoteStream) -> None:
        """Removes a stream that has ended. Idempotent."""
        timer = self.waiting.pop(stream, None)
        if timer is not None:
            timer.cancel()
        self._end_probe(stream)
        self.dispatch()

    def dispatch(self) -> None:
        """Sends waiting streams to ready engines: resumed ones first, then suspects, then new ones."""
        if not self.waiting:
            return
        # Which engines are ready is asked for each stream: the one before may have filled what waits for an engine.
        for stream in [each for each in self.waiting if not each.failovers and each.admitted.done()]:
            # One without a token may crash the next engine, and a suspect that is probed there would be blamed.
            self._send_to_one(self._not_probing() or (self._ready() if stream.tokens else ()), stream)
        suspects = sorted((each for each in self.waiting if each.failovers), key=lambda each: each.tokens)
        for replica in self._ready() if suspects else ():
            if suspects and all(reader.has_token for reader in replica.readers.values()):
                stream = self._probes[replica] = suspects.pop()
                self._send(stream, replica)
        if suspects:
            return
        for stream in [*self.waiting]:
            if not (others := self._not_probing()):
                return
            self._send_to_one(others, stream)

    def _not_probing(self) -> Sequence[Replica]:
        """Those that are ready and probe no suspect."""
        return [replica for replica in self._ready() if replica not in self._probes]

    def _send_to_one(self, replicas: Sequence[Replica], stream: RemoteStream) -> None:
        if (replica := self._choose(replicas, stream.request)) is not None:
            self._send(stream, replica)

    def _send(self, stream: RemoteStream, replica: Replica) -> None:
        timer = self.waiting.pop(stream)
        if timer is not None:
            timer.cancel()
        stream.send_to(replica)

    def _wait(self, stream: RemoteStream) -> None:
        timer = None
        if stream.deadline is not None:
            left = max(0.0, stream.deadline - self._clock())
            end = partial(stream.fail, RunTimeout("The request timed out while it waited for an engine."))
            timer = asyncio.get_running_loop().call_later(left, end)
        self.waiting[stream] = timer

    def _end_probe(self, stream: RemoteStream) -> None:
        """Ends the probe of `stream`, if there is one."""
        for replica in [replica for replica, suspect in self._probes.items() if suspect is stream]:
            del self._probes[replica]
