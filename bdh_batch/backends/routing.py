"""Chooses the replica that computes a request: the one with its prompt's prefix in the cache, else the least loaded."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from bdh_batch.backends.outstanding import Outstanding
from bdh_batch.messages import GenerationRequest

BLOCK = 64  # tokens: prefixes are compared in multiples of it
MOST_BLOCKS = 256  # of a prompt; a longer prefix counts as one of so many
MOST_KNOWN = 2**16  # prefixes
# A replica with the prefix may have so many streams more than the least loaded one, or half as many again.
IMBALANCE = 4


class Target(Protocol):
    """What can compute a request: a `replica.Replica`."""

    @property
    def address(self) -> object: ...

    @property
    def outstanding(self) -> Outstanding: ...


AnyTarget = TypeVar("AnyTarget", bound=Target)


def least_loaded(ready: Sequence[AnyTarget], tenant: str, draw: random.Random) -> AnyTarget:
    """Returns any one of those of `ready`, which is not empty, that are least loaded for a tenant.

    If front ends took the first of these, all would send what comes until the next heartbeat to the same replica.
    """
    share = Outstanding.share_of(tenant, (replica.outstanding for replica in ready))
    loads = [replica.outstanding.load_for(tenant, share) for replica in ready]
    least = min(loads)
    return draw.choice([replica for replica, load in zip(ready, loads, strict=True) if load == least])


class Routing:
    """Remembers which replica has computed which of the latest prefixes, and routes requests by that.

    Args:
        draw: decides between replicas that are loaded alike.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._known: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, ready: Sequence[AnyTarget], request: GenerationRequest) -> AnyTarget | None:
        """Returns one of `ready` for `request`, and remembers its prefixes; None where no replica is ready."""
        if not ready:
            return None
        tenant = request.origin.tenant
        chosen = least = least_loaded(ready, tenant, self._draw)
        prefixes = [*self._prefixes(request)]
        found, blocks = self._with_longest(ready, prefixes)
        if found is not None and self._may_have_more(found, least, tenant, ready):
            chosen = found
        for prefix in prefixes:
            self._known[prefix] = str(chosen.address)
            self._known.move_to_end(prefix)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        chosen.outstanding.expect(request.prompt_tokens - (blocks * BLOCK if chosen is found else 0))
        return chosen

    def _with_longest(self, ready: Sequence[AnyTarget], prefixes: Sequence[bytes]) -> tuple[AnyTarget | None, int]:
        """Returns the replica that has computed the longest of `prefixes`, and that one's blocks; None where none has
        computed any."""
        by_name = {str(replica.address): replica for replica in ready}
        for blocks in range(len(prefixes), 0, -1):
            if (replica := by_name.get(self._known.get(prefixes[blocks - 1], ""))) is not None:
                return replica, blocks
        return None, 0

    @staticmethod
    def _may_have_more(found: Target, least: Target, tenant: str, ready: Sequence[Target]) -> bool:
        """Whether `found` may have more than the least loaded replica: streams of all tenants, and of that one. Prompts
        do not count: they are over sooner than a prefix would be computed elsewhere."""
        one, other = found.outstanding, least.outstanding
        share = Outstanding.share_of(tenant, (replica.outstanding for replica in ready))
        pairs = (one.streams, other.streams), (one.streams_of(tenant, share), other.streams_of(tenant, share))
        return all(load <= max(lowest + IMBALANCE, 1.5 * lowest) for load, lowest in pairs)

    @staticmethod
    def _prefixes(request: GenerationRequest) -> Iterator[bytes]:
        """Yields a hash of each prefix of the first prompt, its cache namespace and its salt, short prefixes first."""
        origin, tokens = request.origin, request.prompts[0].tokens
        digest = hashlib.blake2b(f"{origin.cache_namespace}\0{request.salt}".encode(), digest_size=16)
        for begin in range(0, min(len(tokens), MOST_BLOCKS * BLOCK) - BLOCK + 1, BLOCK):
            digest.update(repr([*tokens[begin : begin + BLOCK]]).encode())
            yield digest.digest()
