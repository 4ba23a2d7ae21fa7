"""Who is next of those that wait: by priority class, inside it by fair shares of the tenants, inside one by arrival.

A tenant is a key, or, where none is asked for, an address, of which there may be very many. Its account counts the
work done for it, divided by its weight; who has the least goes first. One that comes back from a pause starts where the
others are: time in which it asked for nothing is not saved up.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

Line = tuple[int, str]  # who waits behind one another: a priority, and a tenant

FEW = 1024  # accounts, which are not worth clearing out
NOTHING = 1e-6  # what sums of prices may be off by
GENERATED = 2.0  # what a generated token counts, where one of a prompt counts 1: it takes a step of its own


def count_out(lines: Counter[Line], line: Line) -> None:
    """One fewer is in `line`; an empty one is forgotten."""
    lines[line] -= 1
    if not lines[line]:
        del lines[line]


class Account:
    """What one tenant has used, in tokens over its weight, and how many of its sequences hold a state.

    A prompt is charged when it gets its place; what of that is still to be computed is `owed`.
    """

    __slots__ = ("owed", "per_generated", "seats", "used", "weight")

    def __init__(self, weight: float = 1.0) -> None:
        self.used = 0.0
        self.owed = 0.0
        self.seats = 0
        self.weigh(weight)

    def weigh(self, weight: float) -> None:
        self.weight = weight
        self.per_generated = GENERATED / weight

    @property
    def had(self) -> float:
        """What has been computed of what it has used."""
        return self.used - self.owed

    def charge(self, price: float) -> None:
        self.used += price
        self.owed += price

    def refund(self, price: float) -> None:
        """What was charged for is not computed any more."""
        self.charge(-price)


class FairQueue:
    """
    Args:
        weights: of tenants; one that is not named weighs 1. Twice the weight is twice the share.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._accounts: dict[str, Account] = {}
        self._clear_at = FEW
        self._most = 0.0  # that any of those had that were cleared out
        self._classes: dict[int, dict[str, list[Sequence]]] = {}  # by priority, by tenant; a list's last is its first
        self._tokens = 0
        self.lines: Counter[Line] = Counter()  # how many wait

    def __len__(self) -> int:
        return self.lines.total()

    def __iter__(self) -> Iterator[Sequence]:
        return (s for lines in self._classes.values() for line in lines.values() for s in reversed(line))

    @property
    def tokens(self) -> int:
        """Of the prompts that wait."""
        return self._tokens

    def account(self, tenant: str) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._clear_at:
                self._clear_out()
            account = self._accounts[tenant] = Account(self._weights.get(tenant, 1.0))
        return account

    def push(self, sequence: Sequence) -> None:
        """Takes a new one, or back one that was taken out before its turn."""
        sequence.account = self.account(sequence.tenant)
        if sequence.weight is not None:
            sequence.account.weigh(sequence.weight)
        line = self._classes.setdefault(sequence.priority, {}).setdefault(sequence.tenant, [])
        if not line:
            self._catch_up(sequence.account)
        insort(line, sequence, key=lambda waiting: -waiting.place)
        self.lines[sequence.line] += 1
        self._tokens += len(sequence.prompt)

    def _catch_up(self, account: Account) -> None:
        """One that was idle starts where the one that has least is, or, alone, where the one that had most was."""
        if not account.seats:
            account.used = max(account.used, self._level())

    def _level(self) -> float:
        """Where one that was idle starts, however little it has had."""
        lines = ((tenant, line) for tenants in self._classes.values() for tenant, line in tenants.items())
        waiting = {id(self._accounts[tenant]) for tenant, line in lines if line}
        busy = [other.had for other in self._accounts.values() if other.seats or id(other) in waiting]
        return min(busy) if busy else max(self._most, *(other.used for other in self._accounts.values()), 0.0)

    def _clear_out(self) -> None:
        """Forgets those that are idle and would start at the level in any case."""
        level = self._level()
        waiting = {tenant for tenants in self._classes.values() for tenant in tenants}
        self._accounts = {
            tenant: other
            for tenant, other in self._accounts.items()
            if other.seats or other.owed > NOTHING or tenant in waiting or other.used > level
        }
        self._most = max(self._most, level)
        self._clear_at = max(FEW, 2 * len(self._accounts))

    def peek(self) -> Sequence | None:
        """The next one."""
        if not self._classes:
            return None
        lines = self._classes[min(self._classes)]
        return lines[min(lines, key=lambda tenant: (self._accounts[tenant].used, lines[tenant][-1].place))][-1]

    def newest(self) -> Sequence | None:
        """The last that came of the longest line of the last class."""
        if not self.lines:
            return None
        priority, tenant = max(self.lines, key=lambda line: (line[0], self.lines[line]))
        return self._classes[priority][tenant][0]

    def serve(self, sequence: Sequence) -> None:
        """Takes out `sequence`, whose turn it is, and charges its prompt to its tenant, once."""
        if sequence.scheduled is None:  # else it has lost its state, through no fault of its own
            sequence.owed, sequence.price = len(sequence.prompt), 1 / sequence.account.weight
            sequence.account.charge(sequence.owed * sequence.price)
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        lines = self._classes[sequence.priority]
        line = lines[sequence.tenant]
        if line[-1] is sequence:
            line.pop()
        else:
            line.remove(sequence)
        if not line:
            del lines[sequence.tenant]
        if not lines:
            del self._classes[sequence.priority]
        count_out(self.lines, sequence.line)
        self._tokens -= len(sequence.prompt)
