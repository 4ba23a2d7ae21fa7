"""Decides which sequences run, plans each step, and commits its outcome. Pure: no thread, no clock, no tensor.

A sequence waits in the queue, runs in a slot on the device, may be preempted and run again, and is gone. Only copies
move states: to preempt by swap, to resume, to cache a prefix, to begin with one. The order is in `rank.py`, preemption
in `preemption.py`, and what a step computes in `batch.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import count
from math import inf

from bdh_batch.errors import BDHError, GenerationFailed
from bdh_batch.messages import Delta, Outcome
from bdh_batch.scheduler.anticipation import Anticipation
from bdh_batch.scheduler.batch import BatchBuilder, Step
from bdh_batch.scheduler.deadlines import Deadlines
from bdh_batch.scheduler.file_states import FileStates
from bdh_batch.scheduler.policy import Counts, Policy
from bdh_batch.scheduler.preemption import Preemption
from bdh_batch.scheduler.rank import Rank, rank, tenant_rank
from bdh_batch.scheduler.sequence import WAITING, QueueKey, Sequence, Stage
from bdh_batch.scheduler.sharing import Sharing
from bdh_batch.scheduler.slot_allocator import SlotAllocator
from bdh_batch.scheduler.stages import Stages
from bdh_batch.scheduler.step_size import StepSize
from bdh_batch.scheduler.tenants import Tenants
from bdh_batch.scheduler.transfers import Load

Update = tuple[Sequence, Delta]

AGE = 256  # sequences that age in one plan: a crowd that does would hold up the step
PREFIX_WAITERS = 128  # that one plan has wait for others: more would hold up the step
OVERDUE = 8  # times what a prompt takes alone, after which it is due
NOBODY: Rank = (-inf,)  # before it goes no rank
PROMPT_TOKEN = 2e-4  # seconds of one, as long as that is not known


class Scheduler:
    """Gives slots to sequences, plans each step, and commits its outcome.

    Args:
        slots: slots for states on the device; as many sequences can be in one step.
        prefill_tokens: most prompt tokens in a step, of all sequences together.
    """

    def __init__(self, slots: int, prefill_tokens: int, policy: Policy | None = None) -> None:
        self.policy = policy = policy or Policy()
        swapped = policy.host_slots if policy.swaps else 0  # as many sequences at most
        self._scratch = min(1, swapped)  # without a slot to spare, no two states could change theirs
        self.max_running = min(policy.max_running or slots, slots + swapped - self._scratch)
        self.counts = Counts()
        self.size = StepSize(prefill_tokens, min(slots, self.max_running))
        self._batches = BatchBuilder(self.size, policy)
        self.allocator = SlotAllocator(slots, policy)
        self.transfers = self.allocator.transfers
        self.sharing = Sharing(self.allocator, policy.cache_prefixes, policy.share_all, policy.min_shared)
        self.files = FileStates(self.allocator, self.sharing)
        self.anticipation = Anticipation(policy.guards.awaits)
        self._tenants = Tenants(policy.weights)
        self._deadlines = Deadlines()
        self.stages = Stages(self.allocator, self.sharing, self.counts, policy.queue_unit)
        groups = self.stages.groups
        self._queue, self.running, self.swapped = groups[Stage.QUEUED], groups[Stage.RUNNING], groups[Stage.SWAPPED]
        self._first = 0  # the first priority of all sequences
        self._arrivals = count(1)

    @property
    def free(self) -> int:
        """How many more sequences could get a state without a preemption."""
        return max(0, min(self.max_running - len(self.running) - len(self.swapped), self.allocator.room))

    @property
    def last_priority(self) -> int | None:
        """A sequence of an earlier priority than this preempts a running one; None while nothing runs."""
        return max((self._first if aged else priority for priority, aged in self.running.priorities), default=None)

    @property
    def has_work(self) -> bool:
        waits = self.transfers.pending or self.sharing.pending or len(self.allocator.copies) > 0
        return waits or len(self.stages) > 0

    def submit(self, sequences: Iterable[Sequence]) -> None:
        for sequence in (s for s in sequences if s.finish_reason is None):  # others were aborted on their way here
            standing, arrived = sequence.standing, sequence.times.arrived
            standing.arrival, standing.served_at, standing.since = next(self._arrivals), arrived, self.counts.steps
            standing.account = self._tenants.join(sequence.tenant, sequence.weight)
            alone = len(sequence.prompt) * (self._batches.cost.prompt_token or PROMPT_TOKEN)
            standing.due = arrived + min(OVERDUE * alone, self.policy.patience)
            self.stages.move(sequence, Stage.QUEUED)
            self.anticipation.arrived(sequence.tenant, arrived)
            self._deadlines.add(sequence)
            self.files.submitted(sequence)

    def shed(self, count: int, tokens: int, queue_key: QueueKey, error: BDHError) -> list[Update]:
        """Ends `count` of those in the queue with `tokens` in their prompts, or more, for newcomers of a queue: the
        last of those who fill it."""
        updates: list[Update] = []
        while (len(updates) < count or tokens > 0) and (
            yielding := self.stages.backlog.yielding(queue_key)
        ) is not None:
            last = next(filter(None, (self.stages.groups[stage].last(yielding) for stage in WAITING)))
            updates += self.abort([last], error)
            tokens -= len(last.prompt)
        return updates

    def abort(self, sequences: Iterable[Sequence], error: BDHError | None = None) -> list[Update]:
        """Ends those of `sequences` that have not ended: with an error, or without one where their client has left."""
        updates = [(s, s.fail(error)) for s in sequences if s.finish_reason is None]
        self._end(sequence for sequence, _ in updates)
        return updates

    def expire(self, now: float) -> list[Update]:
        """Ends the sequences that have timed out."""
        return [update for sequence, error in self._deadlines.due(now) for update in self.abort([sequence], error)]

    def fail_all(self, error: BDHError) -> list[Update]:
        return self.abort([*self.stages], error)

    def fail(self, step: Step, error: BDHError) -> list[Update]:
        """Ends the sequences of a step that could not be computed, as their states are no longer known. Others whose
        copies are not made have theirs computed again."""
        others, updates = self._give_up_copies(step)
        self.stages.restart(others)
        return self.abort(step.sequences, error) + updates

    def out_of_memory(self, step: Step) -> list[Update]:
        """Makes later steps smaller, as this one ran out of memory; they compute its sequences' states again."""
        if not self.size.shrink(step.prefill_tokens, len(step.sequences)):
            return self.fail(step, GenerationFailed("There is not enough memory for the request."))
        others, updates = self._give_up_copies(step)
        self.stages.restart([*step.sequences, *others])
        forwards = [sequence for _, members in self.running.forwards(self._first) for sequence in members]
        for sequence in forwards[self.size.width :]:
            self.stages.move(sequence, Stage.SWAPPED)
        return updates

    def plan(self, now: float) -> Step | None:
        """Plans the next step, or returns None where nothing can run."""
        self.allocator.begin(now)
        self.counts.steps += 1
        self.files.plan_copies()
        for waiter in self.sharing.advance(self.stages.in_prompt()):
            self.stages.move(waiter, Stage.QUEUED)
        self._age(now)
        if self._queue or self.swapped:
            self._give_slots(now)
        self.allocator.release_idle()
        prompts = {sequence for sequence in self.stages.prompts if not sequence.at_latent}
        return self._batches.build(self.running, prompts, self.stages.watching, self._first, self.allocator)

    def commit(self, step: Step, outcome: Outcome, now: float) -> list[Update]:
        """Commits the outcome of a step: returns its sequences' deltas, and frees the slots of those that ended."""
        ended: list[Update] = []
        others: list[Update] = []
        for row, (sequence, segment) in enumerate(zip(step.sequences, step.plan.segments, strict=True)):
            delta = sequence.take(segment, outcome, row, now)
            if delta is not None:
                (others if delta.finish_reason is None else ended).append((sequence, delta))
        self._batches.computed(step, now - step.planned)
        self.files.save(ended)
        self._end(sequence for sequence, _ in ended)
        leading = self._leading_rank() if ended else NOBODY
        for sequence in {each.tenant: each for each, _ in ended}.values():
            if not (sequence.standing.account.waiting or sequence.standing.account.slots):
                goes_first = tenant_rank(sequence, self._first) <= leading
                self.anticipation.left(sequence.tenant, goes_first, now - step.planned, now)
        return ended + others

    def loaded(self, load: Load, error: str | None) -> list[Update]:
        """A state is in its slot, or could not be read because of `error`: who waited for it is queued again."""
        waiting, room = [*load.waiting], max(1, self.size.width - len(self.running))
        for sequence in waiting:
            self.stages.move(sequence, Stage.QUEUED)
        return self.abort(*self.files.loaded(load, waiting, error, room))

    # Which sequences run

    def _age(self, now: float) -> None:
        """Has those compete in the first priority for which nothing was computed for as long as the patience."""
        present = self.stages.priorities
        self._first = min(present, default=0)
        if len(present) < 2:
            return
        for _ in range(AGE):
            if (sequence := self.stages.ageing.first(now - self.policy.patience)) is None:
                return
            self.stages.age(sequence)

    def _give_slots(self, now: float) -> None:
        """Gives slots to waiting sequences, in the order of their ranks."""
        exchanges = max(1, self.size.width // (self.policy.time_slice if self.policy.guards.exchanges else 1))
        preemption = Preemption(self.running, self._first, self.policy, self.counts.steps, exchanges)
        waiters = 0
        while waiters < PREFIX_WAITERS and (found := self._next(preemption)) is not None:
            candidate, victim = found
            fresh = candidate.stage is Stage.QUEUED
            if fresh and (stage := self.files.awaits(candidate) or self.sharing.awaits(candidate)) is not None:
                self.stages.move(candidate, stage)
                waiters += 1
            elif not self._run(candidate, victim, now):
                return

    def _next(self, preemption: Preemption) -> tuple[Sequence, Sequence | None] | None:
        """The sequence to run next, and the one to preempt for it, if any. Candidates are the first in rank of those
        queued and of those swapped; the next one is considered where there is no slot for one."""
        for candidate in sorted(self._queue.heads() + self.swapped.heads(), key=partial(rank, first=self._first)):
            crowded = candidate.stage is Stage.QUEUED and self._is_crowded(candidate)
            if len(self.running) < self.size.width and not crowded:
                return candidate, None
            victim = preemption.victim(candidate, crowded, self._loses_state(candidate))
            if victim is not None:
                return candidate, victim
        return None

    def _is_crowded(self, candidate: Sequence) -> bool:
        """Whether as many hold a state as may. Swapped ones of a later priority do not keep it out."""
        if len(self.running) + len(self.swapped) < self.max_running:
            return False  # as mostly
        own = rank(candidate, self._first)[0] if self.policy.guards.later_apart else inf
        swapped = sum(n for (priority, aged), n in self.swapped.priorities.items() if aged or priority <= own)
        return len(self.running) + swapped >= self.max_running

    def _loses_state(self, candidate: Sequence) -> bool:
        """Whether there is no room for another state, so that its victim is preempted by recompute."""
        return candidate.stage is Stage.QUEUED and self.allocator.room <= self._scratch

    def _run(self, candidate: Sequence, victim: Sequence | None, now: float) -> bool:
        """Puts `candidate` in a slot on the device, instead of `victim`. False if there is none for it."""
        fresh = candidate.stage is Stage.QUEUED
        entry = self.sharing.cached_prefix(candidate) if fresh else None
        if self.allocator.full and not (fresh and entry is None):
            return False  # it would have to be copied
        if victim is not None:
            self._preempt(victim, by_recompute=self._loses_state(candidate))
        # Of those that wait for one state, none takes its slot from the others; but not for ever.
        waited = self.counts.steps - candidate.standing.since
        patient = candidate.prefix.expects is not None and victim is None and waited < self.policy.time_slice
        if not self.allocator.bring(candidate, entry, patient, self.sharing.is_only_use(candidate, entry)):
            return False
        if fresh:
            self.sharing.begun(candidate, entry, alone=not self.running)
            candidate.begin(now)
            self.counts.served += 1
        self.stages.move(candidate, Stage.RUNNING)
        return True

    def _preempt(self, sequence: Sequence, by_recompute: bool) -> None:
        """It waits in the queue, and all that is known of it will be computed again; or it keeps its state, in its slot
        on the device until that is needed."""
        self.counts.preemptions += 1
        if by_recompute:
            self.allocator.give(sequence.leave_slot())
            sequence.restart()
        self.stages.move(sequence, Stage.QUEUED if by_recompute else Stage.SWAPPED)

    # Which sequences have ended

    def _leading_rank(self) -> Rank:
        """The first of the tenants' ranks of those that run; where none do, nobody goes before it."""
        return min((tenant_rank(head, self._first) for head in self.running.heads()), default=NOBODY)

    def _end(self, ended: Iterable[Sequence]) -> None:
        """Takes out those that have ended; the state of a complete response may stay as a prefix for others."""
        for sequence in ended:
            if sequence.stage is Stage.NEW:  # it has ended on its way here
                continue
            self.stages.move(sequence, Stage.ENDED)
            self.files.ended(sequence)
        if not self.running:  # there may be no plan for long
            self._batches.forget()

    def _give_up_copies(self, step: Step) -> tuple[list[Sequence], list[Update]]:
        """A step has failed, and no copy is made. Returns the sequences that are not in it whose states are lost, too,
        and what is said of states that are not saved."""
        slots, saves = self.allocator.copies.give_up()
        self.sharing.forget(slots)
        self._batches.forget()
        computed = set(step.sequences)
        others = [s for s in (*self.running, *self.swapped) if s.slot in slots and s not in computed]
        return others, self.files.lost(saves)
