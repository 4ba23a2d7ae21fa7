"""The endpoints of one upstream: which are up, which are left alone for a while, and which one is asked next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from bdh_batch.upstreams.config import Upstream
from bdh_batch.upstreams.errors import described
from bdh_batch.upstreams.protocol import Connector, EndpointFacts, Fault

log = logging.getLogger(__name__)

UNKNOWN = EndpointFacts()
DECLARED = "declared"  # the fingerprint of endpoints that the settings say are alike


class Observer(Protocol):
    """Counts what happens at upstreams: the metrics."""

    def answered(self, upstream: str, seconds: float) -> None:
        """Is called with the seconds from a request to its first token."""

    def failed(self, upstream: str, kind: str) -> None:
        """Is called when an endpoint fails a request."""

    def went_elsewhere(self, upstream: str, begun: bool) -> None:
        """Is called when a request goes to another endpoint, with whether it had begun."""

    def ended(self, upstream: str, outcome: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Is called when a request ends."""


@dataclass(eq=False, slots=True)
class Endpoint:
    """One server, and how it has fared. After `failures` in a row it is left alone until `closed_until`, and then gets
    one request to try."""

    address: str
    outstanding: int = 0
    failures: int = 0
    closed_until: float = 0.0
    trying: bool = False
    up: bool = True  # by the last health check; one that was not checked yet may be
    facts: EndpointFacts = UNKNOWN
    chosen: int = 0  # when it was asked last, in requests to all of them


class Endpoints:
    """The endpoints of one upstream.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, upstream: Upstream, connector: Connector, clock: Callable[[], float] = time.monotonic) -> None:
        self._upstream = upstream
        self._connector = connector
        self._clock = clock
        self._requests = 0
        self._checks: list[asyncio.Task[None]] = []
        self.all: Sequence[Endpoint] = [Endpoint(each, facts=self._facts(UNKNOWN)) for each in upstream.addresses]

    def choose(self, without: Collection[Endpoint] = (), like: str | None = None) -> Endpoint | None:
        """Returns the endpoint with the fewest requests under way, and of several the one that has waited longest;
        None where none can be asked.

        Args:
            like: the fingerprint that it has to have; None is any.
        """
        alike = [each for each in self.all if like is None or each.facts.fingerprint == like]
        able = [each for each in alike if each not in without and self._able(each)]
        return min(able, key=lambda each: (each.outstanding, each.chosen), default=None)

    @contextmanager
    def asking(self, endpoint: Endpoint) -> Iterator[None]:
        """Counts a request to the endpoint, and remembers how it ended: a Fault that leaves the block is its own."""
        self._requests += 1
        endpoint.chosen = self._requests
        endpoint.outstanding += 1
        trial = endpoint.failures >= self._upstream.failures
        endpoint.trying |= trial
        try:
            yield
        except Fault as fault:
            if fault.blames_endpoint:
                self._failed(endpoint)
            raise
        finally:
            endpoint.outstanding -= 1
            if trial:
                endpoint.trying = False

    def succeeded(self, endpoint: Endpoint) -> None:
        """Is called when a token has come from it."""
        endpoint.failures = 0
        endpoint.closed_until = 0.0
        endpoint.up = True

    @property
    def retry_after(self) -> int:
        """Whole seconds until one may be asked again."""
        now = self._clock()
        waits = [max(each.closed_until - now, 0 if each.up else self._upstream.health_seconds) for each in self.all]
        return max(1, math.ceil(min(waits)))

    @property
    def ours(self) -> bool:
        """Whether any of them is known to be a server like this one."""
        return any(each.facts.ours for each in self.all)

    def ready(self) -> str | None:
        """Returns why no request can be served at present, or None."""
        if self.choose() is not None:
            return None
        return f"no endpoint of the upstream {self._upstream.id!r} can be asked"

    def start(self) -> None:
        """Begins the health checks. To be called on the event loop."""
        self._checks = self._checks or [asyncio.create_task(self._watch(endpoint)) for endpoint in self.all]

    async def close(self) -> None:
        """Ends them. Idempotent."""
        checks, self._checks = self._checks, []
        for check in checks:
            check.cancel()
        for check in checks:
            with contextlib.suppress(asyncio.CancelledError):
                await check

    async def check(self, endpoint: Endpoint) -> None:
        """Looks once whether an endpoint is up, and whether it is a server like this one."""
        limit = self._upstream.connect_seconds
        try:
            async with asyncio.timeout(2 * limit):
                facts = await self._connector.probe(endpoint.address)
        except (Fault, TimeoutError) as error:
            why = described(error) if isinstance(error, Fault) else f"no reply within {2 * limit:g} s"
            if endpoint.up:
                log.warning("upstream %s: %s is down: %s", self._upstream.id, endpoint.address, why)
            endpoint.up = False
            return
        if not endpoint.up:
            log.info("upstream %s: %s is up", self._upstream.id, endpoint.address)
        endpoint.up = True
        endpoint.facts = self._facts(facts)

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            try:
                await self.check(endpoint)
            except Exception:
                log.exception("upstream %s: the check of %s failed", self._upstream.id, endpoint.address)
                endpoint.up = False
            await asyncio.sleep(self._upstream.health_seconds)

    def _facts(self, found: EndpointFacts) -> EndpointFacts:
        """Returns what is to be believed of an endpoint: what the settings say, else what was found out."""
        if (said := self._upstream.ours) is None:
            return found
        return EndpointFacts(said, DECLARED if said else None)

    def _able(self, endpoint: Endpoint) -> bool:
        if not endpoint.up:
            return False
        if endpoint.failures < self._upstream.failures:
            return True
        return self._clock() >= endpoint.closed_until and not endpoint.trying

    def _failed(self, endpoint: Endpoint) -> None:
        chosen = self._upstream
        endpoint.failures += 1
        if (further := endpoint.failures - chosen.failures) >= 0:
            seconds = min(chosen.max_backoff_seconds, chosen.backoff_seconds * 2 ** min(further, 32))
            endpoint.closed_until = self._clock() + seconds
            text = "upstream %s: %s has failed %d times in a row, and is left alone for %.1f s"
            log.warning(text, chosen.id, endpoint.address, endpoint.failures, seconds)
