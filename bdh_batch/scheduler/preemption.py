"""Which running sequence is preempted for one that waits: the rank of `rank.py`, walked backwards.

One of a later priority is preempted at once. At the same priority a tenant gives way to one with no more virtual time:

- at once where it still holds as many slots for its weight, once one of them has gone to the other;
- otherwise one whose time slice is over, so that states are not moved to and fro. Sequences of one tenant take
  time slices in this way, too.

Where there is no room for one more state, a tenant gives way that holds more of them, and the sequence that does loses
its state. So it must have got on since it began with it, by a time slice and by more than the other one has lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from operator import attrgetter

from bdh_batch.scheduler.sequence import Sequence, Stage
from bdh_batch.scheduler.tenants import Tenant

COMPUTED, SINCE = attrgetter("computed"), attrgetter("standing.since")

Group = tuple[int, Tenant, list[Sequence]]  # what runs of one tenant at one priority


class Preemption:
    """Finds the sequences that are preempted in one plan.

    Args:
        running: what runs as the plan begins. What begins to run in it is not preempted in it.
        time_slice: steps.
        step: the number of this one.
    """

    def __init__(self, running: list[Sequence], time_slice: int, step: int) -> None:
        self._running = running
        self._time_slice = time_slice
        self._step = step

    def victim(self, candidate: Sequence, crowded: bool, by_recompute: bool) -> Sequence | None:
        """The sequence to preempt for `candidate`; None where there is none.

        Args:
            crowded: whether the candidate's state is one more than there may be.
            by_recompute: whether there is no room for another state, so that the victim loses its own.
        """
        own, mine = candidate.standing.effective_priority, candidate.standing.account
        for priority, tenant, members in self._backwards:
            if priority < own:
                return None
            if priority > own or self._holds_more(tenant, mine, given=1):
                giving: Iterable[Sequence] = members
            elif self._may_exchange(tenant, mine, crowded):
                giving = (s for s in members if self._is_over(s, candidate if by_recompute else None))
            else:
                continue
            giving = (s for s in giving if s.stage is Stage.RUNNING and s.standing.since < self._step)
            if (found := min(giving, key=COMPUTED if by_recompute else SINCE, default=None)) is not None:
                return found
        return None

    @cached_property
    def _backwards(self) -> list[Group]:
        """What runs, the last in rank first."""
        groups: dict[tuple[int, Tenant], list[Sequence]] = {}
        for sequence in self._running:
            groups.setdefault((sequence.standing.effective_priority, sequence.standing.account), []).append(sequence)
        by_rank = ((priority, tenant, members) for (priority, tenant), members in groups.items())
        return sorted(by_rank, key=lambda group: (group[0], group[1].virtual_time), reverse=True)

    @staticmethod
    def _holds_more(theirs: Tenant, mine: Tenant, given: int) -> bool:
        """Whether a tenant with no less virtual time holds as many slots for its weight as the other one with one more,
        also once it has `given` up so many."""
        if theirs is mine or theirs.virtual_time < mine.virtual_time:
            return False
        return (theirs.slots - given) * mine.weight >= (mine.slots + 1) * theirs.weight

    def _may_exchange(self, theirs: Tenant, mine: Tenant, crowded: bool) -> bool:
        if crowded:
            return self._holds_more(theirs, mine, given=0)
        return theirs is mine or theirs.virtual_time >= mine.virtual_time

    def _is_over(self, sequence: Sequence, candidate: Sequence | None) -> bool:
        """Whether its time slice is; where it loses its state for `candidate`, whether it has got on enough."""
        if candidate is None:
            return sequence.standing.since <= self._step - self._time_slice
        again = candidate.pending if candidate.times.scheduled is not None else 0
        return len(sequence.generated) - sequence.standing.state_began >= max(self._time_slice, again)
