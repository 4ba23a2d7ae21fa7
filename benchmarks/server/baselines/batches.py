"""An engine that computes batch after batch, each to the end of its longest completion; a batch of one is one at a
time.

Implements `backends.local.Engine`. It knows no priorities, shares or deadlines: who came first goes first.
Its steps are not reported to the observer, only what sequences gained.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence as Many
from concurrent.futures import Future

from bdh_batch.engine.completion import Completion
from bdh_batch.engine.worker import STEP_SECONDS, Load, Observer, StepRunner, engine_down, shutting_down
from bdh_batch.errors import BDHError, GenerationFailed, QueueFull, UnsupportedParameter
from bdh_batch.messages import Delta, FinishReason, Plan, SavedState, Segment
from bdh_batch.messages.state import Warmed
from bdh_batch.scheduler.scheduler import Update
from bdh_batch.scheduler.sequence import Prefix, Sequence

log = logging.getLogger(__name__)

RETRY_AFTER = 5  # seconds


class Batches:
    """
    Args:
        most: sequences of a batch.
        patience: seconds in which a batch is filled, from its first sequence on.
        prefill_tokens: most prompt tokens of a step.
        max_queued: how many sequences may wait; more are refused.
    """

    def __init__(
        self, runner: StepRunner, observer: Observer, most: int, patience: float, prefill_tokens: int, max_queued: int
    ) -> None:
        self._runner, self._observer = runner, observer
        self._most, self._patience, self._prefill_tokens = most, patience, prefill_tokens
        self._max_queued = max_queued
        self._queue: queue.Queue[Sequence | None] = queue.Queue()  # None: there is news, but no sequence
        self._batch: list[Sequence] = []
        self._drawn: dict[Sequence, int] = {}  # each row's last token, also of those that have ended
        self._left: set[Sequence] = set()  # those whose clients have gone
        self._failure: BDHError | None = None  # with which all that is there ends
        self._stopping = False
        self._progress = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="baseline", daemon=True)
        self._thread.start()

    def submit(
        self, sequences: Many[Sequence], queue_timeout: float | None, timeout: float | None, resumed: bool
    ) -> None:
        if not self._thread.is_alive() or self._stopping:
            raise engine_down()
        if queue_timeout is not None or timeout is not None:
            raise UnsupportedParameter("This baseline keeps no deadlines.")
        for sequence in sequences:
            refuse(sequence)
        if self._queue.qsize() + len(sequences) > self._max_queued:
            raise QueueFull("The queue is full.", RETRY_AFTER)
        for sequence in sequences:
            sequence.times.arrived = time.monotonic()
            self._queue.put(sequence)

    def abort(self, sequences: Many[Sequence]) -> None:
        self._left.update(sequence for sequence in sequences if sequence.finish_reason is None)

    def fail_all(self, error: BDHError) -> None:
        self._failure = error
        self._queue.put(None)

    def warm(self, state: SavedState, tokens: bytes, prefix: Prefix) -> Future[Warmed]:
        """No state is kept from one batch to the next."""
        outcome: Future[Warmed] = Future()
        outcome.set_result("no room")
        return outcome

    def health(self, stall_seconds: float) -> str | None:
        if not self._thread.is_alive():
            return "the engine is down"
        stalled = time.monotonic() - self._progress
        return f"no step for {stalled:.0f} s" if self._batch and stalled > stall_seconds else None

    def close(self) -> None:
        self._stopping = True
        self.fail_all(shutting_down())
        self._thread.join(STEP_SECONDS)

    @property
    def load(self) -> Load:
        running = sum(sequence.finish_reason is None for sequence in self._batch)
        return Load(running, self._queue.qsize(), 0, self._most, 0, 0, 0, 0, 0)

    def _main(self) -> None:
        while not self._stopping:
            self._fill()
            try:
                self._compute()
            except Exception:
                log.exception("a batch failed")
                self._end_with(GenerationFailed("The batch that computed this request failed."))
            if self._failure is not None:
                self._empty_queue()

    def _fill(self) -> None:
        """Waits for a first sequence, and so long for more as a batch may wait."""
        self._batch, self._drawn = [], {}
        first = self._queue.get()
        until = time.monotonic() + self._patience
        while first is not None:
            self._batch.append(first)
            try:
                if len(self._batch) == self._most:
                    break
                first = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
        self._progress = time.monotonic()
        for slot, sequence in enumerate(self._batch):
            sequence.slot, sequence.times.scheduled = slot, self._progress

    def _compute(self) -> None:
        self._look_for_ends()
        self._batch = [sequence for sequence in self._batch if sequence.finish_reason is None]
        while entering := [sequence for sequence in self._batch if sequence not in self._drawn]:
            self._step(self._entering(entering))
            self._look_for_ends()
            self._batch = [each for each in self._batch if each in self._drawn or each.finish_reason is None]
        while any(sequence.finish_reason is None for sequence in self._batch):
            self._step([(sequence, self._turn(sequence)) for sequence in self._batch])
            self._look_for_ends()

    def _entering(self, sequences: Many[Sequence]) -> list[tuple[Sequence, Segment]]:
        """A step of prompts, first come, first served."""
        shares, room = [], self._prefill_tokens
        for sequence in sequences:
            if tokens := min(room, sequence.pending):
                shares.append((sequence, sequence.segment(tokens)))
                room -= tokens
        return shares

    def _turn(self, sequence: Sequence) -> Segment:
        """The rows of completions that have ended are computed until all have: a batch is a rectangle."""
        if sequence.finish_reason is None:
            return sequence.decode_segment()
        assert sequence.slot is not None
        return Segment(sequence.slot, sequence.computed, [self._drawn[sequence]], sequence.completion.sampling)

    def _step(self, shares: Many[tuple[Sequence, Segment]]) -> None:
        outcome = self._runner.run(Plan([segment for _, segment in shares]))
        self._progress = now = time.monotonic()
        updates = []
        for row, ((sequence, segment), token) in enumerate(zip(shares, outcome.drawn)):
            if segment.sampling is not None and token is not None:
                self._drawn[sequence] = token
            if sequence.finish_reason is not None:
                sequence.computed += len(segment.tokens)
            elif (delta := sequence.take(segment, outcome, row, now)) is not None:
                updates.append((sequence, delta))
        self._publish(updates)

    def _look_for_ends(self) -> None:
        """Who has left, and whether all have to end."""
        if self._failure is not None:
            self._end_with(self._failure)
        gone = [each for each in self._batch if each in self._left]
        self._left.difference_update(gone)
        updates = []
        for sequence in gone:
            if sequence.finish_reason is None:
                sequence.finish_reason = FinishReason.ABORT
                updates.append((sequence, Delta(finish_reason=FinishReason.ABORT)))
        self._publish(updates)

    def _end_with(self, error: BDHError) -> None:
        self._publish([(each, each.fail(error)) for each in self._batch if each.finish_reason is None])

    def _empty_queue(self) -> None:
        assert self._failure is not None
        failure, self._failure = self._failure, None
        while not self._queue.empty():
            if (sequence := self._queue.get()) is not None:
                self._publish([(sequence, sequence.fail(failure))])

    def _publish(self, updates: list[Update]) -> None:
        if not updates:
            return
        self._loop.call_soon_threadsafe(deliver, updates)
        self._observer.gained([sequence for sequence, delta in updates if delta.tokens])
        for sequence, delta in updates:
            if delta.finish_reason is not None:
                self._observer.finished(sequence, time.monotonic())


def refuse(sequence: Sequence) -> None:
    """What this engine cannot do."""
    completion = sequence.completion
    assert isinstance(completion, Completion)
    if completion.pool:
        raise UnsupportedParameter("This baseline makes no embeddings.")
    if completion.prompt_logprobs is not None:
        raise UnsupportedParameter("This baseline gives no logprobs of prompts.", "echo")
    if sequence.priority:
        raise UnsupportedParameter("This baseline knows no priorities.", "priority")


def deliver(updates: Many[Update]) -> None:
    for sequence, delta in updates:
        sequence.client.outbox.put(sequence.client.index, delta)
