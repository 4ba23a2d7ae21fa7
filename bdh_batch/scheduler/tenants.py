"""Each tenant's virtual time: the tokens it was served over its weight, by which tenants share the machine.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant is charged
as its tokens are computed, and one that has nothing waiting is lifted to the least of the active ones when it asks
again, so that time in which it asked for little is not saved up. A tenant is an API key, or an address without one, of
which there may be very many: nothing here goes over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from bdh_batch.scheduler.ranking import Ranking

GENERATED = 2.0  # what a generated token counts, where one of a prompt counts 1: it takes a step of its own
FORGET = 64  # tenants at a time: a step does not wait for a crowd to be forgotten


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant's account: what it has been charged, and how many of its sequences wait and hold a state."""

    name: str = ""
    weight: float = 1.0
    virtual_time: float = 0.0
    waiting: int = 0  # sequences that wait in the queue
    slots: int = 0  # sequences that hold a state

    def charge(self, prompt_tokens: int, generated: int) -> None:
        self.virtual_time += (prompt_tokens + GENERATED * generated) / self.weight

    def charge_generated(self) -> None:
        """Charges it for one token, as each step does for each of its sequences."""
        self.virtual_time += GENERATED / self.weight

    def count(self, waiting: int, holding: int) -> None:
        """Counts so many more of its sequences that wait, and that hold a state."""
        self.waiting += waiting
        self.slots += holding


class Tenants:
    """The accounts of all tenants, with their virtual times.

    Args:
        weights: of tenants; one that is not named weighs 1. Twice the weight is twice the share.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._known: dict[str, Tenant] = {}
        self._by_time: Ranking[Tenant] = Ranking(attrgetter("virtual_time"))
        self._level = 0.0  # the least virtual time of the active ones, when last looked at

    def join(self, name: str, weight: float | None = None) -> Tenant:
        """Returns the account of tenant `name`, for one more of its sequences."""
        tenant = self._known.get(name) or Tenant(name, self._weights.get(name, 1.0))
        if not tenant.waiting:
            self._by_time.drop(tenant)
            if tenant.virtual_time < (level := self._least_active()):
                tenant.virtual_time = level
            self._known[name] = tenant
            self._by_time.put(tenant)
        if weight is not None:
            tenant.weight = weight
        return tenant

    def _least_active(self) -> float:
        """Where one that comes starts: at the least virtual time of the active tenants. Idle ones below that are
        forgotten, as they would start there in any case; where none is active, it is as far as any has got."""
        for _ in range(FORGET):
            tenant = self._by_time.first()
            if tenant is None:
                break
            self._level = max(self._level, tenant.virtual_time)
            if tenant.waiting or tenant.slots:
                break
            self._by_time.drop(tenant)
            del self._known[tenant.name]
        return self._level
