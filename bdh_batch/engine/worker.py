"""The engine's thread: takes the inbox, plans, runs, commits, publishes; step after step.

Only this thread changes the scheduler and the state. Others hand it messages, and it hands deltas to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence as Many
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from bdh_batch.engine.admission import Admission
from bdh_batch.engine.hand_over import HandOver
from bdh_batch.engine.state_traffic import StateIO, StateTraffic
from bdh_batch.engine.steps import Record, StepRecordings, describe
from bdh_batch.engine.trace import Trace
from bdh_batch.engine.warming import Outcome as Warm, Warming
from bdh_batch.errors import BDHError, GenerationFailed, OutOfMemory, QueueFull, Unavailable
from bdh_batch.messages import Outcome, Plan, SavedState
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.scheduler.scheduler import Scheduler, Update
from bdh_batch.scheduler.sequence import Prefix, Sequence
from bdh_batch.system.threads import start_daemon

log = logging.getLogger(__name__)

WORKER = "bdh-worker"  # the name of the thread
STUCK_SECONDS = 0.1  # between two looks at work that cannot be planned
STEP_SECONDS = 10.0  # a step that takes longer does not keep a server from ending

Message = Callable[[], list[Update]]


def shutting_down() -> Unavailable:
    return Unavailable("The server is shutting down.", retry_after=5)


def engine_down() -> Unavailable:
    return Unavailable("The engine is down.", retry_after=30)


class StepRunner(Protocol):
    """Computes steps: `runner.Runner`, or a stand-in without a model."""

    def run(self, plan: Plan) -> Outcome: ...


class Observer(Protocol):
    """Is notified of what happened, in the worker's thread."""

    def stepped(self, step: Step, seconds: float) -> None: ...

    def looked(self, active: Many[float]) -> None: ...

    def gained(self, sequences: Many[Sequence]) -> None: ...

    def finished(self, sequence: Sequence, now: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Load:
    """The engine's load at one moment, and counts of what it has done since its start."""

    running: int
    waiting: int
    swapped: int
    slots: int
    cached_states: int
    preemptions: int
    cache_queries: int  # tokens of prompts that were looked up
    cache_hits: int  # of them, those that were found
    prompt_tokens: int  # that are still to be computed, of prompts that run, are swapped, or wait


class Worker:
    """Owns the thread in which the scheduler plans and the runner computes.

    Args:
        max_queued, max_queued_tokens: how many requests may wait, and tokens of their prompts; more is refused.
        failed_steps: so many failures on end are a fault that /health reports.
        trace: where decisions are written to; the worker closes it.
        before: is called with every step before it is computed.
        states: reads and writes states; None where there are no transfer slots.
        prepare: does a little of what later steps would wait for, in few milliseconds; is told whether the engine is
            idle, and returns whether there was something to do.
        begin: is called in the worker's thread before its first step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        observer: Observer,
        max_queued: int,
        max_queued_tokens: int = 2**62,
        failed_steps: int = 3,
        trace: Trace | None = None,
        before: Callable[[Step], None] = lambda step: None,
        states: StateIO | None = None,
        prepare: Callable[[bool], bool] = lambda idle: False,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._observer = observer
        policy = scheduler.policy
        self._admission = Admission(
            max_queued, max_queued_tokens, scheduler.max_running, policy.patience, policy.queue_unit
        )
        self._failed_steps = failed_steps
        self._trace = trace
        self._before = before
        self._prepare = prepare
        self._begin = begin
        self._recordings = StepRecordings(scheduler)
        self._traffic = StateTraffic(scheduler, states, self._post_from_thread)
        self._warming = Warming(scheduler, states, self._post_from_thread)
        self._inbox: list[Message] = []
        self._open: set[Sequence] = set()  # those that were admitted and whose end has not been reported
        self._inbox_changed = threading.Condition()
        self._stopping = False
        self._progress = time.monotonic()
        self._planned: Step | None = None  # the step that is being computed, or was last
        self._failures = 0  # on end
        self._stall_logged = False
        self._outbox = HandOver(asyncio.get_running_loop())
        self._thread = start_daemon(self._main, WORKER)  # grammars are walked in it, by native recursion

    def submit(
        self,
        sequences: Many[Sequence],
        queue_timeout: float | None = None,
        timeout: float | None = None,
        resumed: bool = False,
    ) -> None:
        """Queues all of `sequences`, or none; each may wait for, and take in all, so many seconds. Those that are
        `resumed` were admitted elsewhere, and are not refused.

        Raises:
            InvalidRequest: they are more than could ever wait and run.
            QueueFull, Unavailable: not now.
        """
        self._traffic.check(sequences)
        with self._inbox_changed:
            if not self.alive:
                raise engine_down()
            now = time.monotonic()
            for sequence in sequences:
                sequence.times.arrived = now
                sequence.queue_deadline = None if queue_timeout is None else now + queue_timeout
                sequence.deadline = None if timeout is None else now + timeout
            sheds = self._admission.admit(sequences, now, resumed)
            self._open.update(sequences)
            self._post(partial(self._take_in, sequences, sheds))

    def abort(self, sequences: Many[Sequence]) -> None:
        """Ends `sequences` before the next plan."""
        self._post_from_thread(partial(self._scheduler.abort, sequences))

    def warm(self, state: SavedState, tokens: bytes, prefix: Prefix) -> Warm:
        """Has the state after packed `tokens` read, when the engine is idle, and cached as one of a request with
        `prefix`. Whoever calls it waits for the outcome before the next one."""
        outcome = Warm()
        self._post_from_thread(partial(self._warming.add, state, tokens, prefix, outcome))
        return outcome

    def fail_all(self, error: BDHError) -> None:
        """Ends whatever waits or runs with an error."""
        self._post_from_thread(partial(self._scheduler.fail_all, error))

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

    def health(self, stall_seconds: float) -> str | None:
        """What is wrong, or None. Work without a step for `stall_seconds` is; its first sight is logged."""
        if not self.alive:
            return "the engine is down"
        if self._failures >= self._failed_steps:
            return f"the last {self._failures} steps failed"
        stalled = self.stalled_for()
        if stalled <= stall_seconds:
            self._stall_logged = False
            return None
        if not self._stall_logged:
            self._stall_logged = True
            log.error("no step for %.0f s although there is work; the last plan: %s", stalled, describe(self._planned))
        return f"the engine has work, but made no step for {stalled:.0f} s"

    @property
    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            running=len(scheduler.running),
            waiting=self._admission.queued,
            swapped=len(scheduler.swapped),
            slots=scheduler.size.width,
            cached_states=len(scheduler.sharing.cache),
            preemptions=scheduler.counts.preemptions,
            cache_queries=scheduler.sharing.queries,
            cache_hits=scheduler.sharing.hits,
            prompt_tokens=self._admission.prompt_tokens + scheduler.stages.prompt_tokens,
        )

    def queues(self, most: int) -> Mapping[str, int]:
        """How many sequences of each tenant wait: of those of whom most do."""
        return self._admission.queues(most)

    async def record_steps(self, count: int, seconds: float) -> list[Record]:
        """Returns the next `count` steps (`steps.py`), or those within some seconds. Raises Unavailable."""
        return await self._recordings.record(count, seconds)

    def _take_in(self, sequences: Many[Sequence], sheds: bool) -> list[Update]:
        """Where it `sheds` others for them, as many go as are too many now."""
        of, updates = self._scheduler, []
        if sheds:
            tokens = of.stages.backlog.tokens + sum(len(sequence.prompt) for sequence in sequences)
            excess = self._admission.excess(len(of.stages.backlog) + len(sequences), tokens, of.free)
            updates = of.shed(*excess, sequences[0].queue_key, self._made_room())
        of.submit(sequences)
        self._admission.arrived(sequences, of.stages.take_changes())
        if self._trace is not None:
            self._trace.submitted(sequences, time.monotonic())
        return updates

    def _made_room(self) -> QueueFull:
        text = "The queue is full, and other tenants have fewer or earlier requests in it."
        return QueueFull(text, self._admission.retry_after())

    def _post(self, message: Message) -> None:
        self._inbox.append(message)
        self._inbox_changed.notify()

    def _post_from_thread(self, message: Message) -> None:
        with self._inbox_changed:
            self._post(message)

    def _main(self) -> None:
        last_words = shutting_down()
        try:
            self._begin()
            while not self._stopping:
                self._step()
        except Exception:
            log.critical("the engine's thread died", exc_info=True)
            last_words = engine_down()
        with self._inbox_changed:
            self._stopping = True  # from here on nothing is submitted: all that ever was gets an end
            ending = [*self._open]
        self._hand_over([(sequence, sequence.fail(last_words)) for sequence in ending])
        self._hand_over(self._traffic.last_words(last_words))
        if self._trace is not None:
            self._trace.close()

    def _step(self) -> None:
        """Plans and computes a step. Counts before it publishes: a client that has seen an end finds the slot free."""
        updates = [update for message in self._take_inbox() for update in message()]
        of, now = self._scheduler, time.monotonic()
        while of.has_work and not self._stopping and (pause := of.anticipation.until(now) - now) > 0:
            updates += [update for message in self._take_inbox(pause) for update in message()]
            now = time.monotonic()
        updates += self._scheduler.expire(now)
        step = self._scheduler.plan(now)
        if step is None:
            self._traffic.settle()
        self._traffic.begin(now)
        self._count()
        self._publish(updates)
        if step is not None:
            updates = self._compute(step)
            self._count()
            self._publish(updates)
            self._prepare(False)
            self._progress = time.monotonic()
            self._traffic.settle()
        elif self._scheduler.has_work:
            # A state is read that all wait for, or it is a fault of the scheduler, which /health will report.
            with self._inbox_changed:
                if not (self._inbox or self._stopping):
                    self._inbox_changed.wait(STUCK_SECONDS)

    def _take_inbox(self, pause: float = 0.0) -> list[Message]:
        """The messages that have come; waits for one when there is nothing else to do, or until memory has been idle
        for so long that it goes back to the system; else for `pause` seconds at most."""
        while not (self._inbox or self._stopping or self._scheduler.has_work) and self._prepare(True):
            self._progress = time.monotonic()
        if not (self._inbox or self._scheduler.has_work):
            self._warming.go_on()
        with self._inbox_changed:
            while not (self._inbox or self._stopping or self._scheduler.has_work):
                check_invariants(self._scheduler)
                due = self._scheduler.allocator.release_due
                if not self._inbox_changed.wait(None if due is None else max(0.0, due - time.monotonic())):
                    break
                self._progress = time.monotonic()
            if pause and not (self._inbox or self._stopping):
                self._inbox_changed.wait(pause)
            messages, self._inbox = self._inbox, []
        return messages

    def _count(self) -> None:
        """What waits, now that a plan has given out slots or a step has ended some."""
        of, now = self._scheduler, time.monotonic()
        self._admission.update(of.stages.take_changes(), of.free, of.counts.served, now, of.last_priority)

    def _compute(self, step: Step) -> list[Update]:
        self._planned = step
        self._before(step)
        record = self._recordings.begun(step)
        began = time.monotonic()
        try:
            outcome = self._runner.run(step.plan)
        except OutOfMemory as error:
            self._recordings.ended(record, time.monotonic() - began, error)
            updates = self._scheduler.out_of_memory(step)
            log.warning(
                "a step of %s ran out of memory (%s); from now on at most %d prompt tokens and %d sequences a step",
                *(describe(step), error, self._scheduler.size.prefill, self._scheduler.size.width),
            )
            self._failed(step, error)
            return updates
        except Exception as error:  # whatever it was, only the sequences of this step are lost
            self._recordings.ended(record, time.monotonic() - began, error)
            if self._failures == 0:
                log.exception("a step of %s failed", describe(step))
            elif self._failures < self._failed_steps:
                log.error("a step failed again: %r", error)
            self._failed(step, error)
            return self._scheduler.fail(step, GenerationFailed("The step that computed this request failed."))
        now = time.monotonic()
        self._recordings.ended(record, now - began)
        self._failures = 0
        if step.plan.segments or step.plan.copies:
            self._observer.stepped(step, now - began)
        if outcome.active:
            self._observer.looked(outcome.active)
        self._traffic.computed(step)
        updates = self._scheduler.commit(step, outcome, now)
        if self._trace is not None:
            self._trace.stepped(step, now)
        return updates

    def _failed(self, step: Step, error: Exception) -> None:
        self._failures += 1
        if self._failures == self._failed_steps:
            log.error("%d steps on end failed; /health says so until one succeeds", self._failures)
        if self._trace is not None:
            self._trace.stepped(step, time.monotonic(), repr(error))

    def _publish(self, updates: list[Update]) -> None:
        """Metrics first: a client that has seen an end finds it counted."""
        if not updates:
            return
        ended = [sequence for sequence, delta in updates if delta.finish_reason is not None]
        now = time.monotonic()
        self._observer.gained([sequence for sequence, delta in updates if delta.tokens])
        for sequence in ended:
            self._observer.finished(sequence, now)
        self._hand_over(updates)
        self._open.difference_update(ended)
        self._traffic.published(updates)
        if self._trace is not None:
            self._trace.updated(updates, now)

    def _hand_over(self, updates: list[Update]) -> None:
        """Where nobody waits any more, the thread ends."""
        if updates and not self._outbox.put(updates):
            with self._inbox_changed:
                self._stopping = True
