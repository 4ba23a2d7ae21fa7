"""Finds the next of the sequences that wait for a slot, in the order of `rank.py`.

The sequences of one tenant and priority wait in one queue. There may be very many tenants: nothing here goes over all
of them. A queue whose head has waited for longer than the patience competes in the first priority there is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING

from bdh_batch.scheduler.backlog import NO_UNIT, Backlog
from bdh_batch.scheduler.priorities import has_aged
from bdh_batch.scheduler.ranking import Ranking
from bdh_batch.scheduler.sequence import QueueKey
from bdh_batch.scheduler.tenants import Tenant

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

AGE = 256  # queues at a time: a step does not wait for a crowd to age


class TenantQueue:
    """What waits of one tenant at one priority."""

    __slots__ = ("account", "sequences")

    def __init__(self, account: Tenant) -> None:
        self.account = account
        self.sequences: list[Sequence] = []  # the last one is due first

    @property
    def head(self) -> Sequence:
        return self.sequences[-1]

    @property
    def rank(self) -> tuple[float, int, float, int]:
        """The rank of its head among those of one priority."""
        standing = self.sequences[-1].standing
        return self.account.virtual_time, self.account.slots, standing.due, standing.arrival


RANK_OF_HEAD = attrgetter("rank")


class FairQueue:
    """Holds the sequences that wait for a slot, and finds the first of them in rank.

    Args:
        patience: seconds after which a sequence that waits competes in the first priority.
        unit: tokens of a prompt that count as one more sequence, where it is asked which tenant fills the queue.
    """

    def __init__(self, patience: float = inf, unit: int = NO_UNIT) -> None:
        self._patience = patience
        self._queues: dict[QueueKey, TenantQueue] = {}  # none of them is empty
        self._of_tenant: dict[Tenant, list[TenantQueue]] = {}  # nor is any of these
        self._by_priority: dict[int, Ranking[TenantQueue]] = {}  # those whose heads have not waited too long
        self._priorities: list[int] = []  # of these, in order
        self._aged: Ranking[TenantQueue] = Ranking(RANK_OF_HEAD)  # the others
        self._ageing: Ranking[TenantQueue] = Ranking(lambda queue: queue.head.standing.served_at)  # not yet aged
        self._now = -inf
        self._backlog = Backlog(unit)

    def __len__(self) -> int:
        return len(self._backlog)

    def __iter__(self) -> Iterator[Sequence]:
        return (s for queue in self._queues.values() for s in reversed(queue.sequences))

    @property
    def tokens(self) -> int:
        """Of the prompts that wait."""
        return self._backlog.tokens

    def push(self, sequence: Sequence) -> None:
        queue = self._queues.get(sequence.queue_key)
        if queue is None:
            queue = self._queues[sequence.queue_key] = TenantQueue(sequence.standing.account)
            queue.account.queues += 1
            self._of_tenant.setdefault(queue.account, []).append(queue)
        is_head = not queue.sequences or _latest_first(queue.head) < _latest_first(sequence)
        if is_head and queue.sequences:
            self._leave(sequence.priority, queue)
        insort(queue.sequences, sequence, key=_latest_first)
        if is_head:
            self._enter(sequence.priority, queue)
        self._backlog.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.queue_key]
        was_head = queue.head is sequence
        if was_head:
            self._leave(sequence.priority, queue)
        del queue.sequences[bisect_left(queue.sequences, _latest_first(sequence), key=_latest_first)]
        if not queue.sequences:
            del self._queues[sequence.queue_key]
            queue.account.queues -= 1
            self._of_tenant[queue.account].remove(queue)
            if not queue.account.queues:
                del self._of_tenant[queue.account]
        elif was_head:
            self._enter(sequence.priority, queue)
        self._backlog.remove(sequence)

    def reorder(self, tenant: Tenant) -> None:
        """`tenant` holds fewer slots than before."""
        for queue in self._of_tenant.get(tenant, ()):
            self._leave(queue.head.priority, queue)
            self._enter(queue.head.priority, queue)

    def age(self, now: float) -> None:
        """Has those compete in the first priority that have waited too long by `now`, the first to come first."""
        self._now = now
        for _ in range(AGE):
            queue = self._ageing.first()
            if queue is None or not has_aged(queue.head, self._patience, now):
                return
            self._leave(queue.head.priority, queue)
            self._enter(queue.head.priority, queue)

    def peek(self, first: int) -> Sequence | None:
        """The next one; no sequence, waiting or not, has a priority before `first`."""
        aged, queue = self._aged.first(), None
        if self._priorities and (self._priorities[0] <= first or aged is None):
            queue = self._by_priority[self._priorities[0]].first()
        if aged is not None and (queue is None or aged.rank < queue.rank):
            queue, aged.head.standing.effective_priority = aged, first
            aged.head.standing.aged = first < aged.head.priority  # else it comes first as it is
        return None if queue is None else queue.head

    def last(self, queue_key: QueueKey) -> Sequence | None:
        """The sequence that is shed first where too much waits for newcomers of that queue to come in."""
        yielding = self._backlog.yielding(queue_key)
        return None if yielding is None else self._queues[yielding].sequences[0]

    def _enter(self, priority: int, queue: TenantQueue) -> None:
        if has_aged(queue.head, self._patience, self._now):
            self._aged.put(queue)
            return
        if priority not in self._by_priority:
            self._by_priority[priority] = Ranking(RANK_OF_HEAD)
            insort(self._priorities, priority)
        self._by_priority[priority].put(queue)
        self._ageing.put(queue)

    def _leave(self, priority: int, queue: TenantQueue) -> None:
        if queue in self._aged:
            self._aged.drop(queue)
            return
        self._ageing.drop(queue)
        others = self._by_priority[priority]
        others.drop(queue)
        if not len(others):
            del self._by_priority[priority]
            self._priorities.remove(priority)


def _latest_first(sequence: Sequence) -> tuple[float, int]:
    return -sequence.standing.due, -sequence.standing.arrival
