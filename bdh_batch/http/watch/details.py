"""What operators see beside the samples: each model, engine process and tenant, as it is now."""

from __future__ import annotations

from heapq import nsmallest
from itertools import islice

from bdh_batch.http.auth.access import Admission
from bdh_batch.http.auth.caller import by_key
from bdh_batch.http.auth.keys import Key
from bdh_batch.http.gate import Gate
from bdh_batch.http.watch.feed import Feed
from bdh_batch.observability.figures import TenantFigures

MOST = 64  # models, engine processes, and tenants: of more, the first, and the busiest

Row = dict[str, object]


async def details(gate: Gate, admission: Admission, feed: Feed) -> dict[str, object]:
    """Returns what there is to see now."""
    models = gate.hosted
    return {
        "status": gate.closed or "ready",
        "models": [
            {"name": model.info.name, "state": model.state, "requests": model.requests(), "owner": model.info.owner}
            for model in models[:MOST]
        ],
        "engines": [engine for model in models for engine in model.engines()][:MOST],
        "tenants": await tenants(admission, feed),
    }


async def tenants(admission: Admission, feed: Feed) -> list[Row]:
    """Returns what each tenant uses, and what its key limits it to: those with most to do first, then keys that have
    used nothing. Of however many keys, it looks at few."""
    keys, used = admission.known_keys(), feed.tenants

    def busy(label: str) -> tuple[int, int]:
        return -used[label].waiting, -used[label].prompt_tokens - used[label].completion_tokens

    busiest = nsmallest(MOST, used, key=busy)
    idle = islice((id for id in keys if id not in used), MOST - len(busiest))
    return [await _row(label, used.get(label), keys.get(label), admission) for label in (*busiest, *idle)]


async def _row(label: str, used: TenantFigures | None, key: Key | None, admission: Admission) -> Row:
    """What has been used is null where it is not known: processes tell of some tenants only (`figures.TENANTS`)."""
    names = ("waiting", "requests", "prompt_tokens", "completion_tokens")
    figures: Row = {name: None if used is None else getattr(used, name) for name in names}
    if key is None:  # an address, or a key that has been revoked
        return {"tenant": label, **figures}
    rights = {
        "name": key.name,
        "operator": bool(key.operator),
        "weight": key.weight,
        "models": None if key.models is None else key.models[:MOST],
    }
    return {"tenant": label, **figures, "key": rights, "limits": await admission.remaining(by_key(key))}
