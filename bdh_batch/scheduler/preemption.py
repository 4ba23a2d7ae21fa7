"""Finds the running sequence that is preempted for one that waits: the rank of `rank.py`, walked backwards.

One of a later priority is preempted at once. At the same priority a tenant gives way to one with no more virtual time:

- at once where it still holds as many slots for its weight, once one of them has gone to the other;
- otherwise with the one that began first, once its time slice is over, so that states are not moved to and fro.
  Sequences of one tenant take time slices in this way, too.

Where there is no room for one more state, a tenant gives way that holds more of them, and the sequence that does loses
its state. So it must have got on since it began with it, by a time slice and by more than the other one has lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bdh_batch.scheduler.running import Group, Running
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.tenants import Tenant


@dataclass(frozen=True)
class Preemption:
    """Finds the sequences that are preempted in one plan.

    Args:
        running: what runs.
        time_slice: steps.
        step: the number of this one. What began to run in it is not preempted in it.
    """

    running: Running
    time_slice: int
    step: int

    def victim(self, candidate: Sequence, crowded: bool, by_recompute: bool) -> Sequence | None:
        """Returns the sequence to preempt for `candidate`; None where there is none.

        Args:
            crowded: whether the candidate's state is one more than there may be.
            by_recompute: whether there is no room for another state, so that the victim loses its own.
        """
        own, mine = candidate.standing.effective_priority, candidate.standing.account
        for (priority, time, _), members in self._groups:
            if (priority, time) < (own, mine.virtual_time):
                return None
            if not members:  # they were preempted in this plan
                continue
            tenant = next(iter(members)).standing.account
            at_once = priority > own or _holds_more(tenant, mine, given=1)
            if not at_once and crowded and not _holds_more(tenant, mine, given=0):
                continue
            order = reversed(members) if at_once else members  # of a tenant, the last to begin; or the first
            found = next((sequence for sequence in order if sequence.standing.since < self.step), None)
            if found is not None and (at_once or self._is_over(found, candidate if by_recompute else None)):
                return found
        return None

    @cached_property
    def _groups(self) -> list[Group]:
        return self.running.backwards()

    def _is_over(self, sequence: Sequence, candidate: Sequence | None) -> bool:
        """Whether its time slice is; where it loses its state for `candidate`, whether it has got on enough."""
        if candidate is None:
            return sequence.standing.since <= self.step - self.time_slice
        again = candidate.pending if candidate.times.scheduled is not None else 0
        return len(sequence.generated) - sequence.standing.state_began >= max(self.time_slice, again)


def _holds_more(theirs: Tenant, mine: Tenant, given: int) -> bool:
    """Whether a tenant holds as many slots for its weight as the other one with one more, also once it has `given` up
    so many."""
    return (theirs.slots - given) * mine.weight >= (mine.slots + 1) * theirs.weight
