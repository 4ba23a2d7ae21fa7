"""Finds the running sequence that is preempted for one that waits: the rank of `rank.py`, walked backwards.

One of a later priority is preempted at once. At the same priority a tenant gives way to one with no more virtual time:

- at once where it still holds as many slots for its weight, once one of them has gone to the other;
- otherwise with the one that began first, once its time slice is over, so that states are not moved to and fro.
  Sequences of one tenant take time slices in this way, too.

A time slice passes with the steps that compute something of its sequence.

Where there is no room for one more state, a tenant gives way that holds more of them, and the sequence that does loses
its state. So it must have got on since it began with it, by a time slice and by more than the other one has lost.

In one plan, as many are preempted as keeps every time slice whole; of later priorities more may be.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from bdh_batch.scheduler.groups import Group, Groups
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.rank import BEGAN, tenant_rank
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.tenants import Tenant


@dataclass
class Preemption:
    """Finds the sequences that are preempted in one plan.

    Args:
        running: what runs.
        first: the first priority.
        policy: how long a time slice is.
        step: the number of this one. What began to run in it is not preempted in it.
        exchanges: most that are preempted; of later priorities more may be.
    """

    running: Groups
    first: float
    policy: Policy
    step: int
    exchanges: int

    def victim(self, candidate: Sequence, crowded: bool, by_recompute: bool) -> Sequence | None:
        """Returns the sequence to preempt for `candidate`; None where there is none.

        Args:
            crowded: whether the candidate's state is one more than there may be.
            by_recompute: whether there is no room for another state, so that the victim loses its own.
        """
        (own, time, _), mine = tenant_rank(candidate, self.first), candidate.standing.account
        for (priority, served, _), members in self._groups:
            if (priority, served) < (own, time) or (priority == own and self.exchanges <= 0):
                return None
            if not members or members[0].standing.since == self.step:
                continue
            longest, theirs = members[0], members[0].standing.account
            at_once = priority > own or _holds_more(theirs, mine, given=1)
            later = not crowded or _holds_more(theirs, mine, given=0)
            if at_once or (later and self._is_over(longest, candidate if by_recompute else None)):
                self.exchanges -= 1
                return members[bisect_left(members, (self.step, 0), key=BEGAN) - 1] if at_once else longest
        return None

    @cached_property
    def _groups(self) -> list[Group]:
        return self.running.forwards(self.first)[::-1]

    def _is_over(self, sequence: Sequence, candidate: Sequence | None) -> bool:
        """Whether its time slice is; where it loses its state for `candidate`, whether it has got on enough."""
        if candidate is None:
            return sequence.standing.steps >= self.policy.time_slice
        again = candidate.pending if self.policy.guards.again and candidate.times.scheduled is not None else 0
        return len(sequence.generated) - sequence.standing.state_began >= max(self.policy.time_slice, again)


def _holds_more(theirs: Tenant, mine: Tenant, given: int) -> bool:
    """Whether a tenant holds as many slots for its weight as the other one with one more, also once it has `given` up
    so many."""
    return (theirs.slots - given) * mine.weight >= (mine.slots + 1) * theirs.weight
