"""Who is next of those that wait: by priority class, inside it by fair shares of the tenants, inside one by arrival.

A tenant is a key, or, where none is asked for, an address, of which there may be very many: nothing here goes over all
of them. Its account counts the work done for it, divided by its weight; who has the least goes first. One that comes
back from a pause starts where the others are: time in which it asked for nothing is not saved up.

A queue whose head has aged (`classes.py`) competes in the first class there is, whatever its own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING

from bdh_batch.scheduler.backlog import NO_UNIT, Backlog, Line
from bdh_batch.scheduler.classes import has_aged
from bdh_batch.scheduler.ranking import Ranking

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

NOTHING = 1e-6  # what sums of prices may be off by
GENERATED = 2.0  # what a generated token counts, where one of a prompt counts 1: it takes a step of its own
FORGET = 64  # accounts at a time: a step does not wait for a crowd to be forgotten
AGE = 256  # queues at a time, for the same reason


class Account:
    """What one tenant has used, in tokens over its weight, and how many of its sequences hold a state.

    A prompt is charged when it gets its place; what of that is still to be computed is `owed`.
    """

    __slots__ = ("charged", "owed", "per_generated", "queues", "seats", "tenant", "used", "weight")

    def __init__(self, weight: float = 1.0, tenant: str = "") -> None:
        self.tenant = tenant
        self.used = 0.0
        self.owed = 0.0
        self.seats = 0
        self.charged = 0  # sequences that it was charged for and that have not ended
        self.queues: list[TenantQueue] = []
        self.weigh(weight)

    def weigh(self, weight: float) -> None:
        self.weight = weight
        self.per_generated = GENERATED / weight

    @property
    def had(self) -> float:
        """What has been computed of what it has used. It never becomes less."""
        return self.used - self.owed

    @property
    def busy(self) -> bool:
        return bool(self.charged or self.queues)

    def charge(self, price: float) -> None:
        self.used += price
        self.owed += price


class TenantQueue:
    """What waits of one tenant at one priority."""

    __slots__ = ("account", "sequences")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.sequences: list[Sequence] = []  # the last one came first

    @property
    def head(self) -> Sequence:
        return self.sequences[-1]

    @property
    def turn(self) -> tuple[float, int]:
        """Who has the least goes first."""
        return self.account.used, self.sequences[-1].place


TURN = attrgetter("turn")


class FairQueue:
    """
    Args:
        weights: of tenants; one that is not named weighs 1. Twice the weight is twice the share.
        patience: seconds after which whoever waits competes in the first class.
        unit: tokens of a prompt that count as one more sequence, where it is asked who fills the queue.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, patience: float = inf, unit: int = NO_UNIT) -> None:
        self._weights = dict(weights or {})
        self._patience = patience
        self._accounts: dict[str, Account] = {}
        self._by_had: Ranking[Account] = Ranking(attrgetter("had"))
        self._most = 0.0  # that any of those had that were forgotten
        self._queues: dict[Line, TenantQueue] = {}  # none of them is empty
        self._classes: dict[int, Ranking[TenantQueue]] = {}  # those whose heads have not waited too long
        self._order: list[int] = []  # of these classes
        self._aged: Ranking[TenantQueue] = Ranking(TURN)  # the others
        self._due: Ranking[TenantQueue] = Ranking(lambda queue: queue.head.served_at)  # those in classes
        self._refunded: set[Account] = set()  # their queues are not where they belong
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

    def account(self, tenant: str) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(self._weights.get(tenant, 1.0), tenant)
            self._by_had.put(account)
        return account

    def push(self, sequence: Sequence) -> None:
        """Takes a new one, or back one that was taken out before its turn."""
        sequence.account = account = self._charged(sequence.tenant)
        if sequence.weight is not None:
            account.weigh(sequence.weight)
        queue = self._queues.get(sequence.line)
        if queue is None:
            queue = self._queues[sequence.line] = TenantQueue(account)
            account.queues.append(queue)
        elif queue.head.place > sequence.place:
            self._leave(sequence.priority, queue)
        insort(queue.sequences, sequence, key=_latest_first)
        if queue.head is sequence:
            self._enter(sequence.priority, queue)
        self._backlog.add(sequence)

    def _charged(self, tenant: str) -> Account:
        """The tenant's account. One that was idle starts where the one that has least is, or, alone, where the one that
        had most was."""
        known = self._accounts.get(tenant)
        if known is not None and known.busy:
            return known
        level = self._level()
        account = self.account(tenant)
        account.used = max(account.used, level)
        return account

    def _level(self) -> float:
        """What the busy one that has least has had. Those below it that are idle are forgotten, as they would start
        there in any case."""
        for _ in range(FORGET):
            account = self._by_had.first()
            if account is None:
                break
            if account.busy:
                return account.had
            self._by_had.drop(account)
            del self._accounts[account.tenant]
            self._most = max(self._most, account.used)
        return self._most

    def age(self, now: float) -> None:
        """Has those compete in the first class that have waited too long by `now`, the first to come first."""
        self._now = now
        for _ in range(AGE):
            queue = self._due.first()
            if queue is None or not self._is_aged(queue):
                return
            self._leave(queue.head.priority, queue)
            self._enter(queue.head.priority, queue)

    def _is_aged(self, queue: TenantQueue) -> bool:
        return has_aged(queue.head, self._patience, self._now)

    def _enter(self, priority: int, queue: TenantQueue) -> None:
        if self._is_aged(queue):
            self._aged.put(queue)
            return
        if priority not in self._classes:
            self._classes[priority] = Ranking(TURN)
            insort(self._order, priority)
        self._classes[priority].put(queue)
        self._due.put(queue)

    def _leave(self, priority: int, queue: TenantQueue) -> None:
        if queue in self._aged:
            self._aged.drop(queue)
            return
        self._due.drop(queue)
        others = self._classes[priority]
        others.drop(queue)
        if not len(others):
            del self._classes[priority]
            del self._order[bisect_left(self._order, priority)]

    def peek(self, first: int) -> Sequence | None:
        """The next one. `rank` is the class that it competes in, where `first` is the first class of all there is."""
        self._settle()
        aged, queue = self._aged.first(), None
        if self._order and (self._order[0] <= first or aged is None):
            queue = self._classes[self._order[0]].first()
        if aged is not None and (queue is None or aged.turn < queue.turn):
            queue, aged.head.rank = aged, first
            aged.head.aged = first < aged.head.priority  # else it comes first as it is
        return None if queue is None else queue.head

    def _settle(self) -> None:
        """Puts the queues of those who have used less than before where they belong now."""
        for account in self._refunded:
            for queue in account.queues:
                ranking = self._aged if queue in self._aged else self._classes[queue.head.priority]
                ranking.put(queue)
        self._refunded.clear()

    def newest(self, line: Line) -> Sequence | None:
        """Who goes first where too much waits for newcomers of `line` to come in."""
        yielding = self._backlog.yielding(line)
        return None if yielding is None else self._queues[yielding].sequences[0]

    def serve(self, sequence: Sequence) -> None:
        """Takes out `sequence`, whose turn it is, and charges its prompt to its tenant, once."""
        if sequence.scheduled is None:  # else it has lost its state, through no fault of its own
            sequence.owed, sequence.price = len(sequence.prompt), 1 / sequence.account.weight
            sequence.account.charge(sequence.owed * sequence.price)
            sequence.account.charged += 1
        self.remove(sequence)

    def ended(self, sequence: Sequence) -> None:
        """What was charged for `sequence`, if it was served, and is not computed is refunded."""
        if sequence.scheduled is None:
            return
        account = sequence.account
        account.charged -= 1
        if sequence.owed:
            account.charge(-sequence.owed * sequence.price)
            self._refunded.add(account)
        if not account.charged:
            account.owed = 0.0  # but for what sums may be off by, it is

    def remove(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.line]
        was_head = queue.head is sequence
        if was_head:
            self._leave(sequence.priority, queue)
        del queue.sequences[bisect_left(queue.sequences, -sequence.place, key=_latest_first)]
        if not queue.sequences:
            del self._queues[sequence.line]
            queue.account.queues.remove(queue)
        elif was_head:
            self._enter(sequence.priority, queue)
        self._backlog.remove(sequence)


def _latest_first(sequence: Sequence) -> int:
    return -sequence.place
