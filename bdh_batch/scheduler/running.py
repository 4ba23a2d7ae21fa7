"""The sequences that run, by priority and tenant, so that they can be walked in the order of `rank.py`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import itemgetter

from bdh_batch.scheduler.rank import TENANT_RANK
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.tenants import Tenant

Members = dict[Sequence, None]  # in the order in which they began to run
Group = tuple[tuple[float, ...], Members]  # with the rank of its tenant


class Running:
    """Holds the running sequences, by priority and tenant."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, Tenant], Members] = {}  # none of them is empty
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        return chain.from_iterable(self._groups.values())

    def push(self, sequence: Sequence) -> None:
        standing = sequence.standing
        self._groups.setdefault((standing.effective_priority, standing.account), {})[sequence] = None
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        key = sequence.standing.effective_priority, sequence.standing.account
        del self._groups[key][sequence]
        if not self._groups[key]:
            del self._groups[key]
        self._size -= 1

    def backwards(self) -> list[Group]:
        """What runs of each tenant at each priority, the last in rank first."""
        ranked = [(TENANT_RANK(next(iter(members))), members) for members in self._groups.values()]
        return sorted(ranked, key=itemgetter(0), reverse=True)
