"""Counts what waits, by priority and tenant, and finds whose requests are shed where that is too much.

No question or change goes over all tenants: it takes time by the root of how much waits, at most.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice

from bdh_batch.scheduler.sequence import QueueKey, Sequence

NO_UNIT = 2**62  # tokens: sequences are of one size, whatever their prompts


class Lengths:
    """A number for each of some tenants, and which tenant has the largest."""

    def __init__(self) -> None:
        self.total = 0
        self._of: dict[str, int] = {}
        self._with: dict[int, dict[str, None]] = {}  # the tenants with each number; few numbers differ

    def __getitem__(self, tenant: str) -> int:
        return self._of.get(tenant, 0)

    def add(self, tenant: str, more: int) -> None:
        before = self._of.pop(tenant, 0)
        after = before + more
        if before:
            alike = self._with[before]
            del alike[tenant]
            if not alike:
                del self._with[before]
        if after:
            self._of[tenant] = after
            self._with.setdefault(after, {})[tenant] = None
        self.total += more

    @property
    def largest(self) -> int:
        return max(self._with, default=0)

    def largest_tenant(self) -> str:
        return next(iter(self._with[self.largest]))

    def most(self, count: int) -> dict[str, int]:
        """The largest numbers, and whose they are."""
        tenants = ((tenant, number) for number in sorted(self._with, reverse=True) for tenant in self._with[number])
        return dict(islice(tenants, count))

    def within(self, most: int) -> int:
        """The sum where no tenant counts more than `most`."""
        return sum(min(number, most) * len(tenants) for number, tenants in self._with.items())


class Backlog:
    """Counts what waits, by priority and tenant.

    Args:
        unit: so many tokens of a prompt count as one more sequence, where sizes are compared: a queue is bounded in
            sequences and in tokens, and can be filled with either.
    """

    def __init__(self, unit: int = NO_UNIT) -> None:
        self._unit = unit
        self.tokens = 0  # of the prompts
        self._counts: defaultdict[int, Lengths] = defaultdict(Lengths)  # of sequences, by priority
        self._sizes: defaultdict[int, Lengths] = defaultdict(Lengths)
        self._tenant_counts = Lengths()
        self._tenant_sizes = Lengths()
        self._priorities: dict[str, dict[int, int]] = {}  # at which each tenant waits, and with how many sequences

    def __len__(self) -> int:
        return self._tenant_counts.total

    def longest(self, count: int) -> dict[str, int]:
        """How many sequences of each tenant wait: of those of whom most do."""
        return self._tenant_counts.most(count)

    def size(self, sequence: Sequence) -> int:
        return 1 + len(sequence.prompt) // self._unit

    def add(self, sequence: Sequence) -> None:
        self._change(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        self._change(sequence, -1)

    def _change(self, sequence: Sequence, sign: int) -> None:
        (priority, tenant), size = sequence.queue_key, sign * self.size(sequence)
        self.tokens += sign * len(sequence.prompt)
        for known, more in ((self._counts, sign), (self._sizes, size)):
            known[priority].add(tenant, more)
            if not known[priority].total:
                del known[priority]
        self._tenant_counts.add(tenant, sign)
        self._tenant_sizes.add(tenant, size)
        own = self._priorities.setdefault(tenant, {})
        own[priority] = own.get(priority, 0) + sign
        if not own[priority]:
            del own[priority]
            if not own:
                del self._priorities[tenant]

    def ahead(self, queue_key: QueueKey, more: int) -> int:
        """How many go before the last of `more` newcomers of a queue, itself included: all of earlier priorities, and
        of each tenant of its priority no more than it has itself, as tenants share alike."""
        priority, tenant = queue_key
        earlier = sum(counts.total for other, counts in self._counts.items() if other < priority)
        return earlier + _ahead_of(self._counts.get(priority, Lengths()), tenant, more)

    def ahead_of_tenant(self, tenant: str, more: int) -> int:
        """Returns the same as `ahead`, as if all requests had one priority."""
        return _ahead_of(self._tenant_counts, tenant, more)

    def gives_way(self, queue_key: QueueKey, size: int) -> bool:
        """Whether others have to go for newcomers of a queue, of that size in all: those of a later priority; a tenant
        of its priority with so much more that it stays the larger one; or, of any, one with more than half of all."""
        priority, tenant = queue_key
        if any(sizes.largest >= size for other, sizes in self._sizes.items() if other > priority):
            return True
        if priority in self._sizes and self._sizes[priority].largest >= self._sizes[priority][tenant] + 2 * size:
            return True
        return self._fills_half(tenant) and self._tenant_sizes.largest >= self._tenant_sizes[tenant] + 2 * size

    def yielding(self, queue_key: QueueKey) -> QueueKey | None:
        """Returns the queue whose newest request is shed first for newcomers of another queue."""
        if not len(self):
            return None
        priority, tenant = queue_key
        last = max(self._sizes)
        if last <= priority and self._fills_half(tenant):
            largest = self._tenant_sizes.largest_tenant()
            return max(self._priorities[largest]), largest
        return last, self._sizes[last].largest_tenant()

    def _fills_half(self, tenant: str) -> bool:
        """Whether one that is not `tenant` has more than half of all."""
        largest = self._tenant_sizes.largest
        return 2 * largest > self._tenant_sizes.total and self._tenant_sizes[tenant] < largest


def _ahead_of(counts: Lengths, tenant: str, more: int) -> int:
    own = counts[tenant] + more
    return counts.within(own) - counts[tenant] + own
