"""Which replica computes a request: the one with least to do, or the one that knows the beginning of its prompt."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from bdh_batch.backends.replica import Replica
from bdh_batch.messages import GenerationRequest

BLOCK = 64  # tokens: prefixes are known by multiples of them
MOST_BLOCKS = 256  # of a prompt; a longer prefix counts as one of so many
MOST_KNOWN = 2**16  # prefixes
IMBALANCE = 4  # streams, or half as many more than the least, that a replica with the prefix may have


class Routing:
    """Remembers which replica has computed which prefixes, for the last of them."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, ready: Sequence[Replica], request: GenerationRequest) -> Replica | None:
        """One of `ready` for `request`, which then knows its prompt; None where there is none."""
        if not ready:
            return None
        least = min(ready, key=lambda replica: replica.outstanding)
        prefixes = [*self._prefixes(request)]
        chosen = self._knowing(ready, prefixes) or least
        if chosen.outstanding > max(least.outstanding + IMBALANCE, 1.5 * least.outstanding):
            chosen = least
        for prefix in prefixes:
            self._known[prefix] = str(chosen.socket)
            self._known.move_to_end(prefix)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return chosen

    def _knowing(self, ready: Sequence[Replica], prefixes: Sequence[bytes]) -> Replica | None:
        """The replica that has the longest of `prefixes`."""
        by_name = {str(replica.socket): replica for replica in ready}
        for prefix in reversed(prefixes):
            if (replica := by_name.get(self._known.get(prefix, ""))) is not None:
                return replica
        return None

    @staticmethod
    def _prefixes(request: GenerationRequest) -> Iterator[bytes]:
        """Those of its first prompt, short ones first; each with whose it is."""
        origin, tokens = request.origin, request.prompts[0].tokens
        digest = hashlib.blake2b(f"{origin.cache_namespace}\0{request.salt}".encode(), digest_size=16)
        for begin in range(0, min(len(tokens), MOST_BLOCKS * BLOCK) - BLOCK + 1, BLOCK):
            digest.update(repr([*tokens[begin : begin + BLOCK]]).encode())
            yield digest.digest()
