"""The engine's thread: takes the inbox, plans, runs, commits, publishes; step after step.

Only this thread changes the scheduler and the state. Others hand it messages, and it hands deltas to the event loop
with one wake-up a step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence as Many
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from bdh_batch.errors import BDHError, GenerationFailed, InvalidRequest, QueueFull, Unavailable
from bdh_batch.messages import Outcome, Plan
from bdh_batch.scheduler.scheduler import Scheduler, Step, Update
from bdh_batch.scheduler.sequence import Sequence

log = logging.getLogger(__name__)

WORKER = "bdh-worker"  # the name of the thread
STEP_SECONDS = 10.0  # a step that takes longer does not keep a server from ending

Message = Callable[[], list[Update]]


def shutting_down() -> Unavailable:
    return Unavailable("The server is shutting down.", retry_after=5)


def engine_down() -> Unavailable:
    return Unavailable("The engine is down.", retry_after=30)


class StepRunner(Protocol):
    def run(self, plan: Plan) -> Outcome: ...


class Observer(Protocol):
    """Is told of what happened, in the worker's thread."""

    def stepped(self, step: Step, seconds: float) -> None: ...

    def gained(self, sequence: Sequence) -> None: ...

    def finished(self, sequence: Sequence, now: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is at this moment."""

    running: int
    waiting: int
    slots: int


class Worker:
    """
    Args:
        max_queued: how many requests may wait for a slot; one more is refused.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, observer: Observer, max_queued: int) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._observer = observer
        self._max_queued = max_queued
        self._inbox: list[Message] = []
        self._inbox_changed = threading.Condition()
        self._arriving = 0  # sequences in the inbox; this and the next two are guarded by _inbox_changed
        self._queued = 0  # sequences in the inbox or waiting in the scheduler
        self._free = scheduler.slots  # slots that no sequence holds
        self._stopping = False
        self._progress = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name=WORKER, daemon=True)
        self._thread.start()

    def submit(self, sequences: Many[Sequence]) -> None:
        """Queues all of `sequences`, or none.

        Raises:
            InvalidRequest: they are more than could ever wait and run.
            QueueFull, Unavailable: not now.
        """
        most = self._scheduler.slots + self._max_queued
        if len(sequences) > most:
            raise InvalidRequest(f"A request may ask for {most} answers in all here, prompts times n.")
        with self._inbox_changed:
            if not self.alive:
                raise engine_down()
            if self._queued + len(sequences) > self._max_queued + self._free:
                raise QueueFull(f"{self._queued} requests are waiting already.", retry_after=1)
            now = time.monotonic()
            for sequence in sequences:
                sequence.arrived = now
            self._arriving += len(sequences)
            self._queued += len(sequences)
            self._post(partial(self._scheduler.submit, sequences))

    def abort(self, sequences: Many[Sequence]) -> None:
        """Ends `sequences` before the next plan."""
        with self._inbox_changed:
            self._post(partial(self._scheduler.abort, sequences))

    def fail_all(self, error: BDHError) -> None:
        """Ends whatever waits or runs with an error."""
        with self._inbox_changed:
            self._post(partial(self._scheduler.fail_all, error))

    def close(self) -> None:
        """Stops the thread after its present step, if that ends in reasonable time. Idempotent."""
        with self._inbox_changed:
            self._stopping = True
            self._inbox_changed.notify()
        self._thread.join(STEP_SECONDS)
        if self._thread.is_alive():
            log.error("the engine's thread is stuck in a step and is left behind")

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def stalled_for(self) -> float:
        """Seconds since the last step while there has been work; 0 when idle."""
        return time.monotonic() - self._progress if self._scheduler.has_work else 0.0

    @property
    def load(self) -> Load:
        return Load(running=self._scheduler.running, waiting=self._queued, slots=self._scheduler.slots)

    def _post(self, message: Message) -> None:
        self._inbox.append(message)
        self._inbox_changed.notify()

    def _main(self) -> None:
        last_words = shutting_down()
        try:
            while not self._stopping:
                self._step()
        except Exception:
            log.critical("the engine's thread died", exc_info=True)
            last_words = engine_down()
        with self._inbox_changed:
            self._stopping = True  # from here on nothing is submitted: all that ever was gets an end
            messages, self._inbox = self._inbox, []
        updates = [update for message in messages for update in message()]
        self._hand_over([*updates, *self._scheduler.fail_all(last_words)])

    def _step(self) -> None:
        self._publish([update for message in self._take_inbox() for update in message()])
        step = self._scheduler.plan(time.monotonic())
        self._count_queued()
        if step is not None:
            self._publish(self._compute(step))
            self._count_queued()
        self._progress = time.monotonic()

    def _take_inbox(self) -> list[Message]:
        """The messages that have come; waits for one when there is nothing else to do."""
        with self._inbox_changed:
            while not (self._inbox or self._stopping or self._scheduler.has_work):
                self._scheduler.check()
                self._inbox_changed.wait()
            messages, self._inbox, self._arriving = self._inbox, [], 0
            self._progress = time.monotonic()
        return messages

    def _count_queued(self) -> None:
        """What waits, and how many slots are free, now that a plan has given some out or a step has ended some."""
        with self._inbox_changed:
            self._queued = self._scheduler.waiting + self._arriving
            self._free = self._scheduler.slots - self._scheduler.running

    def _compute(self, step: Step) -> list[Update]:
        began = time.monotonic()
        try:
            outcome = self._runner.run(step.plan)
        except Exception:  # whatever it was, only the sequences of this step are lost
            log.exception("a step of %d sequences failed", len(step.sequences))
            return self._scheduler.fail(step, GenerationFailed("The step that computed this request failed."))
        now = time.monotonic()
        self._observer.stepped(step, now - began)
        return self._scheduler.commit(step, outcome, now)

    def _publish(self, updates: list[Update]) -> None:
        self._hand_over(updates)
        now = time.monotonic()
        for sequence, delta in updates:
            if delta.tokens:
                self._observer.gained(sequence)
            if delta.finish_reason is not None:
                self._observer.finished(sequence, now)

    def _hand_over(self, updates: list[Update]) -> None:
        """One wake-up of the event loop, however many sequences gained something."""
        if updates:
            self._loop.call_soon_threadsafe(_deliver, updates)


def _deliver(updates: list[Update]) -> None:
    for sequence, delta in updates:
        sequence.outbox.put(sequence.index, delta)
