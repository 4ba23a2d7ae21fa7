"""Counts what tenants have used since the process began, for those who watch the server. No text, and no key."""

from __future__ import annotations

from collections import OrderedDict

from bdh_batch.observability.figures import TENANTS, TenantFigures

MOST = 1024  # tenants that are known; of more, those are forgotten that have used nothing for longest


class Usage:
    """The requests that have ended, and their tokens, by the label of their tenant. Used on the event loop."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._known: OrderedDict[str, TenantFigures] = OrderedDict()  # who has used something last is last

    def add(self, tenant: str, prompt_tokens: int, completion_tokens: int) -> None:
        """A request has ended."""
        found = self._known.setdefault(tenant, TenantFigures())
        self._known.move_to_end(tenant)
        found.requests += 1
        found.prompt_tokens += prompt_tokens
        found.completion_tokens += completion_tokens
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def latest(self, most: int = TENANTS) -> dict[str, TenantFigures]:
        """Returns copies for those that used something last."""
        some = [*self._known.items()][-most:]
        return {
            name: TenantFigures(0, each.requests, each.prompt_tokens, each.completion_tokens) for name, each in some
        }
