"""Each tenant's virtual time: the tokens it was served over its weight, by which tenants share the machine.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant is charged
as its tokens are computed, and one that has nothing waiting is lifted to the least of the active ones when it asks
again, so that time in which it asked for little is not saved up. A tenant is an API key, or an address without one, of
which there may be very many: nothing here goes over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from bdh_batch.scheduler.ranking import Ranking

GENERATED = 2.0  # what a generated token counts, where one of a prompt counts 1: it takes a step of its own
FORGET = 64  # tenants at a time: a step does not wait for a crowd to be forgotten


class Tenant:
    """One tenant's account: what it has been charged, and how many of its sequences are active."""

    __slots__ = ("active", "held", "name", "queues", "slots", "virtual_time", "weight")

    def __init__(self, name: str = "", weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight
        self.virtual_time = 0.0
        self.active = 0  # sequences that have not ended
        self.slots = 0  # of them, those that hold a state
        self.held = 0  # the same, and those that ceased to since its virtual time changed: ranks never become less
        self.queues = 0  # in which some of them wait for a slot, one for each priority

    def charge(self, prompt_tokens: int, generated: int) -> None:
        self.virtual_time += (prompt_tokens + GENERATED * generated) / self.weight
        self.held = self.slots

    def lift(self, level: float) -> None:
        if self.virtual_time < level:
            self.virtual_time, self.held = level, self.slots

    def hold(self, change: int) -> None:
        """Counts `change` more of the tenant's sequences that hold a state."""
        self.slots += change
        self.held += max(0, change)


class Tenants:
    """The accounts of all tenants, with their virtual times.

    Args:
        weights: of tenants; one that is not named weighs 1. Twice the weight is twice the share.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._known: dict[str, Tenant] = {}
        self._by_time: Ranking[Tenant] = Ranking(attrgetter("virtual_time"))
        self._forgotten = 0.0  # the latest virtual time of those that were forgotten

    def join(self, name: str, weight: float | None = None) -> Tenant:
        """Returns the account of tenant `name`, for one more of its sequences."""
        tenant = self._known.get(name) or Tenant(name, self._weights.get(name, 1.0))
        if not tenant.queues:
            self._by_time.drop(tenant)
            tenant.lift(self._least_active())
            self._known[name] = tenant
            self._by_time.put(tenant)
        if weight is not None:
            tenant.weight = weight
        tenant.active += 1
        return tenant

    def _least_active(self) -> float:
        """Where one that comes starts: at the least virtual time of the active tenants. Idle ones below that are
        forgotten, as they would start there in any case; where none is active, it is as far as any has got."""
        for _ in range(FORGET):
            tenant = self._by_time.first()
            if tenant is None:
                break
            if tenant.active:
                return tenant.virtual_time
            self._by_time.drop(tenant)
            del self._known[tenant.name]
            self._forgotten = max(self._forgotten, tenant.virtual_time)
        return self._forgotten
