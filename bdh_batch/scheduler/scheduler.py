"""Decides which sequences run, plans each step, and commits its outcome. Pure: no thread, no clock, no tensor.

A sequence waits in the queue, runs in a slot on the device, may be preempted and run again, and is gone. Only copies
move states: to preempt by swap, to resume, to cache a prefix, to begin with one. The order is in `rank.py`, preemption
in `preemption.py`, and what a step computes in `batch.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

from bdh_batch.errors import BDHError, GenerationFailed, QueueTimeout, RunTimeout
from bdh_batch.messages import Delta, FinishReason, Outcome
from bdh_batch.scheduler.backlog import Backlog
from bdh_batch.scheduler.batch import BatchBuilder, Step
from bdh_batch.scheduler.deadlines import Deadlines
from bdh_batch.scheduler.fair_queue import FairQueue
from bdh_batch.scheduler.policy import Counts, Policy
from bdh_batch.scheduler.preemption import Preemption
from bdh_batch.scheduler.priorities import Priorities, adjust
from bdh_batch.scheduler.rank import RANK
from bdh_batch.scheduler.running import Running
from bdh_batch.scheduler.sequence import HOLDING, WAITING, QueueKey, Sequence, Stage
from bdh_batch.scheduler.sharing import Sharing
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.step_size import StepSize
from bdh_batch.scheduler.tenants import Tenants

Update = tuple[Sequence, Delta]

PREFIX_WAITERS = 128  # that one plan has wait for others: more would hold up the step
OVERDUE = 8  # times what a prompt takes alone, after which it is due
PROMPT_TOKEN = 2e-4  # seconds of one, as long as that is not known


class Scheduler:
    """Gives slots to sequences, plans each step, and commits its outcome.

    Args:
        slots: slots for states on the device; as many sequences can be in one step.
        prefill_tokens: most prompt tokens in a step, of all sequences together.
    """

    def __init__(self, slots: int, prefill_tokens: int, policy: Policy | None = None) -> None:
        policy = policy or Policy()
        self.policy = policy
        self._scratch = min(1, policy.host_slots)  # without a slot to spare, no two states could change theirs
        self.max_running = min(policy.max_running or slots, slots + policy.host_slots - self._scratch)
        self.counts = Counts()
        self._size = StepSize(prefill_tokens, min(slots, self.max_running))
        self._batches = BatchBuilder(self._size, policy.target_step, policy.guards)
        self.allocator = SlotAllocator(slots, policy.host_slots, policy.free_slots, policy.idle_release)
        self.sharing = Sharing(self.allocator, policy.cache_prefixes, policy.share_all, policy.min_shared)
        self._tenants = Tenants(policy.weights)
        self._priorities = Priorities(policy.patience)
        self._deadlines = Deadlines()
        self._backlog = Backlog(policy.queue_unit)  # of those in the queue
        self._queue = FairQueue(policy.patience)
        self._swapped = FairQueue(policy.patience)
        self._running = Running()
        self._prompts: list[Sequence] = []  # of these, those that have more to compute than one token a step
        self._arrivals = 0
        self._exchanges = 0  # sequences that may still be preempted in this plan
        self._changes: dict[Sequence, int] = {}  # which sequences wait now, and did not when last asked: 1, or -1

    @property
    def waiting(self) -> int:
        return len(self._queue) + self.sharing.waiting_count

    @property
    def waiting_tokens(self) -> int:
        return self._backlog.tokens + self.sharing.waiting_tokens

    @property
    def prefill_cap(self) -> int:
        """The largest number of prompt tokens in a step."""
        return self._size.prefill

    @property
    def width(self) -> int:
        """The largest number of sequences that run at a time."""
        return self._size.width

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def swapped(self) -> int:
        return len(self._swapped)

    @property
    def free(self) -> int:
        """How many more sequences could get a state without a preemption."""
        return max(0, min(self.max_running - self.running - self.swapped, self.allocator.room))

    @property
    def last_priority(self) -> int | None:
        """A sequence of an earlier priority than this preempts a running one; None while nothing runs."""
        return self._priorities.last if self._running else None

    @property
    def has_work(self) -> bool:
        return bool(self._running or self.swapped or self.waiting)

    @property
    def release_due(self) -> float | None:
        """The time in seconds at which a plan will release memory although there is no work; None where none will."""
        return self.allocator.release_due(self.sharing.cache)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.finish_reason is not None:  # it was aborted on its way here
                continue
            self._arrivals += 1
            standing, arrived = sequence.standing, sequence.times.arrived
            standing.arrival, standing.served_at, standing.since = self._arrivals, arrived, self.counts.steps
            standing.account = self._tenants.join(sequence.tenant, sequence.weight)
            alone = len(sequence.prompt) * (self._batches.cost.prompt_token or PROMPT_TOKEN)
            standing.due = arrived + min(OVERDUE * alone, self.policy.patience)
            adjust(self._priorities.present, sequence.priority, 1)
            self._move(sequence, Stage.QUEUED)
            self._deadlines.add(sequence)

    def take_changes(self) -> dict[Sequence, int]:
        """Returns the sequences that wait since the last call (1), and those that no longer wait (-1)."""
        changes, self._changes = self._changes, {}
        return changes

    def shed(self, count: int, tokens: int, queue_key: QueueKey, error: BDHError) -> list[Update]:
        """Ends `count` of those in the queue with `tokens` in their prompts, or more, for newcomers of a queue: the
        last of those who fill it."""
        updates: list[Update] = []
        while (len(updates) < count or tokens > 0) and (yielding := self._backlog.yielding(queue_key)) is not None:
            last = self._queue.last(yielding)
            updates += self._fail([last], error)
            tokens -= len(last.prompt)
        return updates

    def abort(self, sequences: Iterable[Sequence]) -> list[Update]:
        """Ends those of `sequences` that have not ended, as their client has left."""
        ending = [sequence for sequence in sequences if sequence.finish_reason is None]
        for sequence in ending:
            sequence.finish_reason = FinishReason.ABORT
        self._end(ending)
        return [(sequence, Delta(finish_reason=FinishReason.ABORT)) for sequence in ending]

    def expire(self, now: float) -> list[Update]:
        """Ends the sequences that have timed out."""
        updates = []
        for sequence in self._deadlines.due(now):
            if sequence.times.scheduled is None:
                error: BDHError = QueueTimeout("The request timed out while it waited in the queue.")
            else:
                error = RunTimeout("The request timed out before its response was complete.")
            updates += self._fail([sequence], error)
        return updates

    def fail_all(self, error: BDHError) -> list[Update]:
        return self._fail([*self._queue, *self.sharing.waiters, *self._running, *self._swapped], error)

    def fail(self, step: Step, error: BDHError) -> list[Update]:
        """Ends the sequences of a step that could not be computed, as their states are no longer known."""
        self.sharing.forget_fresh()
        return self._fail({*step.sequences, *step.moved}, error)

    def out_of_memory(self, step: Step) -> list[Update]:
        """Makes later steps smaller, as this one ran out of memory; they compute its sequences' states again."""
        if not self._size.shrink(step.prefill_tokens, len(step.sequences)):
            return self.fail(step, GenerationFailed("There is not enough memory for the request."))
        self.sharing.forget_fresh()
        for sequence in {*step.sequences, *step.moved}:
            if sequence.finish_reason is None:
                sequence.restart()
        backwards = [s for _, members in self._running.backwards() for s in reversed(members)]
        for sequence in backwards[: max(0, self.running - self.width)]:
            self._move(sequence, Stage.SWAPPED)
        self._prompts = [*self._running]
        return []

    def plan(self, now: float) -> Step | None:
        """Plans the next step, or returns None where nothing can run."""
        self.allocator.begin(now)
        self.counts.steps += 1
        for waiter in self.sharing.advance(self._prompts):
            self._move(waiter, Stage.QUEUED)
        for waiting in (self._queue, self._swapped):
            waiting.age(now)
        self._priorities.update(self._running, now)
        self._give_slots(now)
        self._prompts = [s for s in self._prompts if s.stage is Stage.RUNNING and not s.decodes]
        self.allocator.release_idle(self.sharing.cache)
        return self._batches.build(self._running, self._prompts, self.allocator, now)

    def commit(self, step: Step, outcome: Outcome, now: float) -> list[Update]:
        """Commits the outcome of a step: returns its sequences' deltas, and frees the slots of those that ended."""
        updates: list[Update] = []
        ended: list[Sequence] = []
        for row, (sequence, segment) in enumerate(zip(step.sequences, step.plan.segments, strict=True)):
            delta, standing = sequence.take(segment, outcome, row, now), sequence.standing
            standing.served_at = now
            if standing.charged < len(sequence.prompt):
                standing.charge(min(sequence.computed, len(sequence.prompt)))
            if segment.sampling is not None:
                standing.due = now
                standing.account.charge(0, 1)
            if delta is not None:
                updates.append((sequence, delta))
                if delta.finish_reason is not None:
                    ended.append(sequence)
        self.counts.prompt_tokens += step.prefill_tokens
        self._batches.computed(step, now - step.planned)
        self.sharing.settle()
        self._end(ended)
        return updates

    def check(self) -> None:
        """Raises AssertionError where an invariant does not hold."""
        holding, slots = [*self._running, *self._swapped], self.allocator.slots
        held = [-1 if sequence.slot is None else sequence.slot for sequence in holding]
        every = [*slots.free, *held, *(entry.slot for entry in self.sharing.cache)]
        assert sorted(every) == list(range(slots.device + slots.host)), "each slot once"
        assert all(slots.on_device(s.slot) for s in self._running if s.slot is not None), "what runs is there"
        parked = {s for s in self._swapped if s.slot is not None and slots.on_device(s.slot)}
        assert set(self.allocator.parked) == parked, "what is swapped and still there is known"
        assert all(s.decodes for s in {*self._running} - {*self._prompts}), "prompts are known"
        assert len(self._running) <= self.width, "no more run than may"
        assert all(s.slot is None for s in self._queue), "what waits holds no slot"
        assert all(s.finish_reason is None and s.pending >= 1 for s in holding), "what runs has work"
        for stage, group in (
            (Stage.RUNNING, self._running),
            (Stage.SWAPPED, self._swapped),
            (Stage.QUEUED, self._queue),
        ):
            assert all(sequence.stage is stage for sequence in group), "stages are right"
        assert len(self._backlog) == len(self._queue), "the queue is counted"
        self.sharing.check()

    # Which sequences run

    def _give_slots(self, now: float) -> None:
        """Gives slots to waiting sequences, in the order of their ranks."""
        self._exchanges = max(1, self.width // self.policy.time_slice)
        preemption = Preemption(self._running, self.policy.time_slice, self.counts.steps)
        waiters = 0
        while waiters < PREFIX_WAITERS and (found := self._next(preemption)) is not None:
            candidate, victim = found
            if candidate.stage is Stage.QUEUED and self.sharing.await_prefix(candidate, self._prompts):
                self._move(candidate, Stage.AWAITING_PREFIX)
                waiters += 1
            elif not self._run(candidate, victim, now):
                return

    def _next(self, preemption: Preemption) -> tuple[Sequence, Sequence | None] | None:
        """The sequence to run next, and the one to preempt for it, if any. Candidates are the first in rank of those
        queued and of those swapped; the second one is considered where there is no slot for the first."""
        heads = (waiting.peek(self._priorities.first) for waiting in (self._queue, self._swapped))
        for candidate in sorted((head for head in heads if head is not None), key=RANK):
            if candidate.standing.since == self.counts.steps:  # it was preempted in this plan
                continue
            crowded = candidate.stage is Stage.QUEUED and self._is_crowded(candidate)
            if self.running < self.width and not crowded:
                return candidate, None
            if self._exchanges > 0 or self._priorities.last > candidate.standing.effective_priority:
                victim = preemption.victim(candidate, crowded, self._loses_state(candidate))
                if victim is not None:
                    return candidate, victim
        return None

    def _is_crowded(self, candidate: Sequence) -> bool:
        """Whether as many hold a state as may. Swapped ones of a later priority do not keep it out."""
        own = candidate.standing.effective_priority
        swapped = sum(count for priority, count in self._swapped.priorities.items() if priority <= own)
        return self.running + swapped >= self.max_running

    def _loses_state(self, candidate: Sequence) -> bool:
        """Whether there is no room for another state, so that its victim is preempted by recompute."""
        return candidate.stage is Stage.QUEUED and self.allocator.room <= self._scratch

    def _run(self, candidate: Sequence, victim: Sequence | None, now: float) -> bool:
        """Puts `candidate` in a slot on the device, instead of `victim`. False if there is none for it."""
        if victim is not None:
            self._preempt(victim, by_recompute=self._loses_state(candidate))
        standing, fresh = candidate.standing, candidate.stage is Stage.QUEUED
        entry = self.sharing.cached_prefix(candidate) if fresh else None
        # Of those that wait for one state, none takes its slot from the others; but not for ever.
        waited = self.counts.steps - standing.since
        patient = candidate.prefix.expects is not None and victim is None and waited < self.policy.time_slice
        if not self.allocator.bring(candidate, self.sharing.cache, entry, patient):
            return False
        if fresh:
            self.sharing.begun(candidate, entry, alone=not self._running)
            standing.state_began = len(candidate.generated)
            standing.charged = max(standing.charged, candidate.computed)  # what is cached costs nothing
            if candidate.times.scheduled is None:
                candidate.times.scheduled = now
            self.counts.served += 1
        candidate.decoding = None  # its slot may be another one
        self._move(candidate, Stage.RUNNING)
        self._prompts.append(candidate)
        return True

    def _preempt(self, sequence: Sequence, by_recompute: bool) -> None:
        """It waits in the queue, and all that is known of it will be computed again; or it keeps its state, in its slot
        on the device until that is needed."""
        self.counts.preemptions += 1
        self._exchanges -= 1
        if by_recompute:
            self.allocator.give(sequence.leave_slot())
            sequence.restart()
        self._move(sequence, Stage.QUEUED if by_recompute else Stage.SWAPPED)

    def _move(self, sequence: Sequence, stage: Stage) -> None:
        """Takes it out of the stage that it is in, and puts it into another one."""
        before, sequence.stage = sequence.stage, stage
        standing = sequence.standing
        if before is Stage.RUNNING:
            self._running.remove(sequence)
        elif before is Stage.SWAPPED:
            self._swapped.remove(sequence)
            self.allocator.parked.pop(sequence, None)
        elif before is Stage.QUEUED:
            self._queue.remove(sequence)
            self._backlog.remove(sequence)
        elif before is Stage.AWAITING_PREFIX:
            self.sharing.stop_waiting(sequence)
        if Stage.RUNNING in (before, stage):
            standing.since = self.counts.steps
        if stage is Stage.RUNNING:
            self._running.push(sequence)
            self._priorities.last = max(self._priorities.last, standing.effective_priority)
        elif stage is Stage.SWAPPED:
            standing.due = self.allocator.now
            self._swapped.push(sequence)
            self.allocator.parked[sequence] = None
        elif stage is Stage.QUEUED:
            self._queue.push(sequence)
            self._backlog.add(sequence)
        if held := (stage in HOLDING) - (before in HOLDING):
            standing.account.hold(held)
        change = (stage in WAITING) - (before in WAITING)  # it waits from now on, or no longer
        if change and not self._changes.pop(sequence, 0):
            self._changes[sequence] = change

    # Which sequences have ended

    def _fail(self, sequences: Iterable[Sequence], error: BDHError) -> list[Update]:
        updates = [(s, s.fail(error)) for s in sequences if s.finish_reason is None]
        self._end(sequence for sequence, _ in updates)
        return updates

    def _end(self, ended: Iterable[Sequence]) -> None:
        """Takes out those that have ended; the state of a complete response may stay as a prefix for others."""
        for sequence in ended:
            if sequence.stage is Stage.NEW:  # it has ended on its way here
                continue
            self._move(sequence, Stage.ENDED)
            adjust(self._priorities.present, sequence.priority, -1)
            sequence.standing.account.active -= 1
            self.sharing.expect_no_more(sequence)
            if sequence.slot is not None:
                self.sharing.bequeath(sequence)
