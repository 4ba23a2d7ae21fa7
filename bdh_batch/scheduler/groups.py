"""Holds the sequences of one stage by priority and tenant, so that they can be walked in the order of `rank.py`.

There may be very many tenants: nothing that is done for each sequence goes over all of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

from bdh_batch.scheduler.rank import DUE, Rank, rank, tenant_rank
from bdh_batch.scheduler.ranking import Ranking
from bdh_batch.scheduler.sequence import QueueKey, Sequence

Key = tuple[int, str, bool]  # of a group: the priority, the tenant, and whether its sequences have aged
Group = tuple[Rank, list[Sequence]]  # with the rank of its tenant


class Groups:
    """Holds the sequences of one stage, and finds the first and the last of them in rank.

    Args:
        order: of those of one tenant and priority. It stays as it is while they are here.
    """

    def __init__(self, order: Callable[[Sequence], Any] = DUE) -> None:
        self.priorities: Counter[tuple[int, bool]] = Counter()  # the priority of each, and whether it has aged
        self.changes = 0  # how often a sequence came or went
        self._count = 0
        self._order = order
        self._members: dict[Key, list[Sequence]] = {}  # none of them is empty
        # Those that have aged are apart: which priority is the first one changes, and with it their rank.
        self._ranked: tuple[Ranking[Key], ...] = (Ranking(self._rank), Ranking(self._rank))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._members.values())

    def push(self, sequence: Sequence) -> None:
        key = _key(sequence)
        members = self._members.setdefault(key, [])
        insort(members, sequence, key=self._order)
        if members[0] is sequence:
            self._ranked[sequence.standing.aged].put(key)
        self.priorities[sequence.priority, sequence.standing.aged] += 1
        self.changes += 1
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        key = _key(sequence)
        members = self._members[key]
        del members[bisect_left(members, self._order(sequence), key=self._order)]
        if not members:
            del self._members[key]
            self._ranked[sequence.standing.aged].drop(key)
        priority = sequence.priority, sequence.standing.aged
        self.priorities[priority] -= 1
        if not self.priorities[priority]:
            del self.priorities[priority]
        self.changes += 1
        self._count -= 1

    def heads(self) -> list[Sequence]:
        """The first in rank: of those that compete in their own priorities, and of those that have aged."""
        keys = [ranking.first() for ranking in self._ranked]
        return [self._members[key][0] for key in keys if key is not None]

    def last(self, queue_key: QueueKey) -> Sequence | None:
        """The last in rank of a tenant's at a priority; those that have aged come before the others."""
        members = self._members.get((*queue_key, False)) or self._members.get((*queue_key, True))
        return members[-1] if members else None

    def forwards(self, first: float) -> list[Group]:
        """What is here of each tenant at each priority, the first in rank first."""
        ranked = [(tenant_rank(members[0], first), members) for members in self._members.values()]
        return sorted(ranked, key=itemgetter(0))

    def _rank(self, key: Key) -> Rank:
        return rank(self._members[key][0])


def _key(sequence: Sequence) -> Key:
    return sequence.priority, sequence.tenant, sequence.standing.aged
