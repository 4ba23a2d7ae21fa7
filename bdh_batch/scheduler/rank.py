"""The one order of precedence among sequences: the lower rank goes first.

1. The priority: that of the request, or, once nothing was computed for it for too long (it has aged), the first one
   there is.
2. The virtual time of its tenant (`tenants.py`); of equal ones, as where one has just come, the tenant that holds fewer
   slots. One that gave a slot up without a token is noticed with its next token, as ranks become less then.
3. When it is due. A prompt is due some times what it takes alone after it came, so that short prompts overtake long
   ones, but not for ever; a stream when it had its last token; a preempted sequence when it was preempted.

Walked forwards, the rank fills slots and then the time of a step; walked backwards, it says who is preempted.
"""

from __future__ import annotations

from math import inf
from operator import attrgetter

from bdh_batch.scheduler.sequence import Sequence

Rank = tuple[float, ...]

DUE = attrgetter("standing.due", "standing.arrival")  # the order inside a tenant and a priority
BEGAN = attrgetter("standing.since", "standing.arrival")  # that in which they were given their slots


def rank(sequence: Sequence, first: float = -inf) -> Rank:
    """The rank of a sequence, where `first` is the first priority."""
    standing, account = sequence.standing, sequence.standing.account
    priority = first if standing.aged else sequence.priority
    return priority, account.virtual_time, account.slots, standing.due, standing.arrival


def tenant_rank(sequence: Sequence, first: float) -> Rank:
    """The part of its rank that a sequence has in common with others of its tenant."""
    return rank(sequence, first)[:3]
