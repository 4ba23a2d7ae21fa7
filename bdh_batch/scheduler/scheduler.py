"""Decides which sequences run, and takes in what came of each step. Pure: no thread, no clock, no tensor.

A sequence waits in the queue, runs in a slot on the device, may be preempted and run again, and is gone. Only copies
move states: to preempt by swap, to resume, to cache a prefix, to begin with one. The order is in `rank.py`, preemption
in `preemption.py`, and what a step computes in `batch.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from bdh_batch.errors import BDHError, GenerationFailed, QueueTimeout, RunTimeout
from bdh_batch.messages import Delta, FinishReason, Outcome
from bdh_batch.scheduler.batch import BatchBuilder, Step
from bdh_batch.scheduler.deadlines import Deadlines
from bdh_batch.scheduler.fair_queue import FairQueue
from bdh_batch.scheduler.policy import Counts, Policy
from bdh_batch.scheduler.preemption import Preemption
from bdh_batch.scheduler.priorities import Priorities
from bdh_batch.scheduler.rank import EFFECTIVE_PRIORITY, RANK
from bdh_batch.scheduler.sequence import QueueKey, Sequence, Stage
from bdh_batch.scheduler.sharing import Sharing
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.step_size import StepSize
from bdh_batch.scheduler.tenants import Tenant, Tenants

Update = tuple[Sequence, Delta]

PREFIX_WAITERS = 128  # that one plan has wait for others: more would hold up the step
OVERDUE = 8  # times what a prompt takes alone, after which it is due
PROMPT_TOKEN = 2e-4  # seconds of one, as long as that is not known


class Scheduler:
    """Gives slots to sequences, plans each step, and takes in its outcome.

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
        self._batches = BatchBuilder(self._size, policy.target_step)
        self.allocator = SlotAllocator(slots, policy.host_slots, policy.free_slots, policy.idle_release)
        self.sharing = Sharing(self.allocator, policy.cache_prefixes, policy.share_all, policy.min_shared)
        self._tenants = Tenants(policy.weights)
        self._queue = FairQueue(policy.patience, policy.queue_unit)
        self._deadlines = Deadlines()
        self._running: list[Sequence] = []  # both in the order in which they entered that stage
        self._swapped: list[Sequence] = []
        self._arrivals = 0
        self._exchanges = 0  # sequences that may still be preempted in this plan
        self._resumable: list[Sequence] = []  # in this plan, the swapped ones; the first in rank comes last
        self._in_prompt: list[Sequence] = []  # in this plan, those that run and have generated nothing
        self._preemption = Preemption([], 0, 0)  # in this plan
        self._priorities = Priorities(policy.patience)
        self._last_priority = 0  # no running sequence has a later one
        self._changes: dict[Sequence, int] = {}  # which sequences wait now, and did not when last asked: 1, or -1

    @property
    def waiting(self) -> int:
        return len(self._queue) + self.sharing.waiting_count

    @property
    def waiting_tokens(self) -> int:
        return self._queue.tokens + self.sharing.waiting_tokens

    @property
    def prefill_cap(self) -> int:
        """Most prompt tokens in a step."""
        return self._size.prefill

    @property
    def width(self) -> int:
        """Most sequences that run at a time."""
        return self._size.width

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def swapped(self) -> int:
        return len(self._swapped)

    @property
    def free(self) -> int:
        """How many more sequences could be given a state without anyone making room."""
        return max(0, min(self.max_running - self._holding, self.allocator.room))

    @property
    def last_priority(self) -> int | None:
        """A sequence of an earlier priority than this preempts a running one; None while nothing runs."""
        return self._last_priority if self._running else None

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._swapped or self.waiting)

    @property
    def release_due(self) -> float | None:
        """When a plan will give memory back although there is no work, in seconds; None where none will."""
        return self.allocator.release_due(self.sharing.cache)

    @property
    def _holding(self) -> int:
        return len(self._running) + len(self._swapped)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.finish_reason is not None:  # it was aborted on its way here
                continue
            self._arrivals += 1
            standing = sequence.standing
            standing.arrival, standing.since = self._arrivals, self.counts.steps
            standing.account = self._tenants.join(sequence.tenant, sequence.weight)
            alone = len(sequence.prompt) * (self._batches.cost.prompt_token or PROMPT_TOKEN)
            standing.due = sequence.arrived + min(OVERDUE * alone, self.policy.patience)
            self._priorities.enter(sequence)
            self._queue.push(sequence)
            self._note(sequence, 1)
            self._deadlines.add(sequence)

    def take_changes(self) -> dict[Sequence, int]:
        """Which sequences wait and did not when this was last asked (1), and which wait no longer (-1)."""
        changes, self._changes = self._changes, {}
        return changes

    def shed(self, count: int, tokens: int, queue_key: QueueKey, error: BDHError) -> list[Update]:
        """Ends `count` of those in the queue with `tokens` in their prompts, or more, for newcomers of a queue: the
        last of those who fill it."""
        updates: list[Update] = []
        while (len(updates) < count or tokens > 0) and (last := self._queue.last(queue_key)) is not None:
            updates += self._fail([last], error)
            tokens -= len(last.prompt)
        return updates

    def abort(self, sequences: Iterable[Sequence]) -> list[Update]:
        """Ends those of `sequences` that have not ended; nothing more is computed for them."""
        ending = [sequence for sequence in sequences if sequence.finish_reason is None]
        for sequence in ending:
            sequence.finish_reason = FinishReason.ABORT
        self._end(ending)
        return [(sequence, Delta(finish_reason=FinishReason.ABORT)) for sequence in ending]

    def expire(self, now: float) -> list[Update]:
        """Ends those whose time is up."""
        updates = []
        for sequence in self._deadlines.due(now):
            if sequence.times.scheduled is None:
                error: BDHError = QueueTimeout("The request's time was up while it waited in the queue.")
            else:
                error = RunTimeout("The request's time was up before its response was complete.")
            updates.append((sequence, sequence.fail(error)))
        self._end(sequence for sequence, _ in updates)
        return updates

    def fail_all(self, error: BDHError) -> list[Update]:
        return self._fail([*self._queue, *self.sharing.waiters, *self._running, *self._swapped], error)

    def fail(self, step: Step, error: BDHError) -> list[Update]:
        """The step could not be computed: ends the sequences in it, whose states are no longer known."""
        self.sharing.forget_fresh()
        return self._fail({*step.sequences, *step.moved}, error)

    def out_of_memory(self, step: Step) -> list[Update]:
        """The step needed too much memory: later ones are smaller, and compute again what it has spoilt."""
        if not self._size.shrink(step.prefill_tokens, len(step.sequences)):
            return self.fail(step, GenerationFailed("There is not enough memory for the request."))
        self.sharing.forget_fresh()
        for sequence in {*step.sequences, *step.moved}:
            if sequence.finish_reason is None:
                sequence.restart()
        while len(self._running) > self.width:
            self._swap_out(self._running[-1])
        return []

    def plan(self, now: float) -> Step | None:
        """The next step, or None where nothing can run."""
        self.allocator.begin(now)
        self.counts.steps += 1
        for waiter in self.sharing.advance(self._running):
            self._requeue(waiter)
        self._queue.age(now)
        self._priorities.update(chain(self._running, self._swapped), now)
        self._give_slots(now)
        self.allocator.release_idle(self.sharing.cache)
        return self._batches.build(self._running, self.allocator, now)

    def commit(self, step: Step, outcome: Outcome, now: float) -> list[Update]:
        """Takes in what a step drew; those that ended are out of their slots."""
        updates: list[Update] = []
        ended: list[Sequence] = []
        rows = enumerate(zip(step.sequences, step.plan.segments, outcome.drawn, strict=True))
        for row, (sequence, segment, token) in rows:
            sequence.computed += len(segment.tokens)
            sequence.standing.served_at = now
            if sequence.standing.charged < len(sequence.prompt):
                sequence.charge()
            if segment.targets:
                sequence.take_prompt_scores(outcome.target_scores[row])
            if segment.pool and (delta := sequence.add(outcome.pooled[row])) is not None:
                updates.append((sequence, delta))
                ended.append(sequence)
            if segment.sampling is not None:
                updates.append((sequence, sequence.accept(token, now, outcome.scores.get(row))))
                sequence.standing.due = now
                sequence.standing.account.charge(0, 1)
                if sequence.finish_reason is not None:
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
        for group in (self._running, self._swapped):
            since = [sequence.standing.since for sequence in group]
            assert since == sorted(since), "groups are in order"
        assert len(self._running) <= self.width, "no more run than may"
        assert all(s.slot is None and s.stage is Stage.QUEUED for s in self._queue), "what waits holds no slot"
        assert all(s.finish_reason is None and s.pending >= 1 for s in holding), "what runs has work"
        stages = [Stage.RUNNING] * len(self._running) + [Stage.SWAPPED] * len(self._swapped)
        assert [sequence.stage for sequence in holding] == stages, "stages are right"
        self.sharing.check()

    # Which sequences run

    def _give_slots(self, now: float) -> None:
        """Gives slots to those that wait, in the order of their ranks."""
        if not (self._swapped or len(self._queue)):
            return
        self._exchanges = max(1, self.width // self.policy.time_slice)
        self._last_priority = max(map(EFFECTIVE_PRIORITY, self._running), default=0)
        self._resumable = sorted(self._swapped, key=RANK, reverse=True)
        self._in_prompt = [sequence for sequence in self._running if not sequence.generated]
        self._preemption = Preemption([*self._running], self.policy.time_slice, self.counts.steps)
        waiters = 0
        while waiters < PREFIX_WAITERS and (found := self._next()) is not None:
            candidate, victim = found
            if candidate.stage is Stage.QUEUED and self._await_prefix(candidate):
                waiters += 1
            elif not self._run(candidate, victim, now):
                return

    def _next(self) -> tuple[Sequence, Sequence | None] | None:
        """The sequence to run next, and the one to preempt for it, if any. Candidates are the first in rank of those
        queued and of those swapped; the second one is considered where no slot can be had for the first."""
        waiting = [self._queue.peek(self._priorities.first), *self._resumable[-1:]]
        for candidate in sorted(filter(None, waiting), key=RANK):
            crowded = candidate.stage is Stage.QUEUED and self._is_crowded(candidate)
            if len(self._running) < self.width and not crowded:
                return candidate, None
            if self._exchanges > 0 or self._last_priority > candidate.standing.effective_priority:
                victim = self._preemption.victim(candidate, crowded, self._loses_state(candidate))
                if victim is not None:
                    return candidate, victim
        return None

    def _is_crowded(self, candidate: Sequence) -> bool:
        """Whether as many hold a state as may. Swapped ones of a later priority do not keep it out."""
        own = candidate.standing.effective_priority
        later = sum(other.standing.effective_priority > own for other in self._swapped)
        return self._holding - later >= self.max_running

    def _loses_state(self, candidate: Sequence) -> bool:
        """Whether there is no room for another state, so that its victim is preempted by recompute."""
        return candidate.stage is Stage.QUEUED and self.allocator.room <= self._scratch

    def _run(self, candidate: Sequence, victim: Sequence | None, now: float) -> bool:
        """Puts `candidate` in a slot on the device, instead of `victim`. False, and nothing done, if that cannot be."""
        fresh = candidate.stage is Stage.QUEUED
        if victim is not None and self._loses_state(candidate):
            self._preempt_by_recompute(victim)
            victim = None
        entry = self.sharing.cached_prefix(candidate) if fresh else None
        parked = self._swapped if victim is None else [*self._swapped, victim]
        # Of those that wait for one state, none takes its slot from the others; but not for ever.
        waited = self.counts.steps - candidate.standing.since
        patient = candidate.prefix.expects is not None and victim is None and waited < self.policy.time_slice
        if not self.allocator.bring(candidate, parked, self.sharing.cache, entry, patient):
            return False
        if victim is not None:
            self._swap_out(victim)
            self._count_preemption()
        if fresh:
            self._queue.remove(candidate)
            self._note(candidate, -1)
            self.sharing.begun(candidate, entry, alone=not self._running)
            standing = candidate.standing
            standing.account.slots += 1
            standing.state_began = len(candidate.generated)
            standing.charged = max(standing.charged, candidate.computed)  # what is cached costs nothing
            if candidate.times.scheduled is None:
                candidate.times.scheduled = now
            self.counts.served += 1
        self._enter(candidate)
        return True

    def _preempt_by_recompute(self, sequence: Sequence) -> None:
        """It waits in the queue again, without a state, and all that is known of it will be computed again."""
        self._running.remove(sequence)
        self._holds_less(sequence.standing.account)
        slot, sequence.slot = sequence.slot, None
        assert slot is not None
        self.allocator.give(slot)
        sequence.restart()
        self._priorities.reset(sequence)
        self._requeue(sequence)
        self._note(sequence, 1)
        self._count_preemption()

    def _count_preemption(self) -> None:
        self.counts.preemptions += 1
        self._exchanges -= 1

    def _swap_out(self, sequence: Sequence) -> None:
        """It is preempted by swap, and keeps its slot on the device until that is needed."""
        self._running.remove(sequence)
        self._swapped.append(sequence)
        sequence.stage = Stage.SWAPPED
        sequence.standing.since, sequence.standing.due = self.counts.steps, self.allocator.now
        self._priorities.reset(sequence)

    def _enter(self, sequence: Sequence) -> None:
        """It runs from now on."""
        if sequence.stage is Stage.SWAPPED:
            self._swapped.remove(sequence)
            self._resumable.pop()
        self._running.append(sequence)
        if not sequence.generated:
            self._in_prompt.append(sequence)
        self._last_priority = max(self._last_priority, sequence.standing.effective_priority)
        sequence.stage, sequence.standing.since = Stage.RUNNING, self.counts.steps

    def _holds_less(self, tenant: Tenant) -> None:
        tenant.slots -= 1
        self._queue.reorder(tenant)

    def _await_prefix(self, candidate: Sequence) -> bool:
        """Whether `candidate` should wait for an in-flight prefix, which a running sequence is about to compute."""
        if not self.sharing.await_prefix(candidate, (s for s in self._in_prompt if s.stage is Stage.RUNNING)):
            return False
        self._queue.remove(candidate)
        candidate.stage = Stage.AWAITING_PREFIX
        return True

    def _requeue(self, sequence: Sequence) -> None:
        sequence.stage = Stage.QUEUED
        self._queue.push(sequence)

    def _note(self, sequence: Sequence, change: int) -> None:
        """It waits from now on (1), or no longer (-1)."""
        if self._changes.pop(sequence, 0) + change:
            self._changes[sequence] = change

    # Which sequences have ended

    def _fail(self, sequences: Iterable[Sequence], error: BDHError) -> list[Update]:
        updates = [(s, s.fail(error)) for s in sequences if s.finish_reason is None]
        self._end(sequence for sequence, _ in updates)
        return updates

    def _end(self, ended: Iterable[Sequence]) -> None:
        """Takes out those that have ended; the state of a complete response may stay as a prefix for others."""
        held = False
        for sequence in ended:
            stage, sequence.stage = sequence.stage, Stage.ENDED
            if not sequence.standing.arrival:  # it has ended on its way here
                continue
            self._priorities.leave(sequence)
            sequence.standing.account.active -= 1
            self.sharing.expect_no_more(sequence)
            if stage is Stage.QUEUED:
                self._queue.remove(sequence)
                self._note(sequence, -1)
            elif stage is Stage.AWAITING_PREFIX:
                self.sharing.stop_waiting(sequence)
                self._note(sequence, -1)
            elif stage in (Stage.RUNNING, Stage.SWAPPED):
                held = True
                self._holds_less(sequence.standing.account)
                self.sharing.bequeath(sequence)
        if held:
            self._running = [sequence for sequence in self._running if sequence.stage is Stage.RUNNING]
            self._swapped = [sequence for sequence in self._swapped if sequence.stage is Stage.SWAPPED]
