"""The one order of precedence among sequences: the lower rank goes first.

1. The priority: that of the request, or, once nothing was computed for it for too long, the first one there is.
2. The virtual time of its tenant (`tenants.py`); of equal ones, as where one has just come, the tenant that holds fewer
   slots.
3. When it is due. A prompt is due some times what it takes alone after it came, so that short prompts overtake long
   ones, but not for ever; a stream when it had its last token; a preempted sequence when it was preempted.

Walked forwards, the rank fills slots and then the time of a step; walked backwards, it says who is preempted.
"""

from __future__ import annotations

from math import inf
from operator import attrgetter

TENANT = ("standing.effective_priority", "standing.account.virtual_time", "standing.account.held")
TENANT_RANK = attrgetter(*TENANT)
RANK = attrgetter(*TENANT, "standing.due", "standing.arrival")
DUE = attrgetter("standing.due")
FIRST: tuple[float, ...] = (-inf,)  # before any rank
