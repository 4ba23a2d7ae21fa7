"""How much one engine has to do, as a front end reckons it between two heartbeats of that engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# Tokens of prompts that count as one more stream. With 256, first tokens of conversations came later on simulated
# fleets: short prompts are computed before the next heartbeat says so. With 1024 they came as without this, and sooner
# where one prompt of twenty has 8,000 tokens.
PROMPT_TOKENS = 1024


class Outstanding:
    """What an engine has outstanding: by its last heartbeat that of all front ends, and what this one has begun and
    ended since.

    Loads are in streams. How long completions become is not known, so each counts as one; what is still to be computed
    of prompts comes on top. A load is never less than the front end's own streams.
    """

    def __init__(self) -> None:
        self._own: Counter[str] = Counter()  # streams of this front end, by tenant
        self._begun = 0  # sum of these
        self._reported = self._reported_at = 0  # sequences of all front ends, and streams of this one at that time
        self._prompt_tokens = 0
        self.streams = 0  # of all front ends
        self._prompts = 0  # in streams

    def begin(self, tenant: str) -> None:
        """A stream of this front end has begun."""
        self._own[tenant] += 1
        self._begun += 1
        self._count()

    def end(self, tenant: str) -> None:
        """A stream of this front end has ended."""
        self._own[tenant] -= 1
        self._begun -= 1
        if not self._own[tenant]:
            del self._own[tenant]
        self._count()

    def expect(self, prompt_tokens: int) -> None:
        """So many tokens of a prompt will have to be computed; counts until the engine says itself how many."""
        self._prompt_tokens += prompt_tokens
        self._count()

    def report(self, sequences: int, prompt_tokens: int) -> None:
        """A heartbeat has come: with the sequences of all front ends, and the tokens of their prompts that are still
        to be computed."""
        self._reported, self._reported_at = sequences, self._begun
        self._prompt_tokens = prompt_tokens
        self._count()

    def load_for(self, tenant: str, share: float) -> float:
        """The load for a tenant, whose own streams weigh as much as those of all: each engine shares itself between the
        tenants that it has, so a tenant has its share of all engines only where its streams are spread over them.

        Args:
            share: the tenant's, `share_of`.
        """
        return (self.streams + self.streams_of(tenant, share)) / 2 + self._prompts

    def streams_of(self, tenant: str, share: float) -> float:
        """A tenant's streams of all front ends. Its part in those of others is taken to be as large as in those of this
        one here; where these are few, as in those on all engines: `share` counts as one more of them."""
        own = self._own.get(tenant, 0)
        return own + (self.streams - self._begun) * (own + share) / (self._begun + 1)

    @staticmethod
    def share_of(tenant: str, engines: Iterable[Outstanding]) -> float:
        """A tenant's part, 0 to 1, in this front end's streams on some engines; 0 where there are none."""
        own = begun = 0
        for each in engines:
            own += each._own.get(tenant, 0)
            begun += each._begun
        return own / begun if begun else 0.0

    def _count(self) -> None:
        self.streams = max(self._begun, self._reported + self._begun - self._reported_at)
        self._prompts = self._prompt_tokens // PROMPT_TOKENS
