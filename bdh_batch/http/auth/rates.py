"""Limits each caller's requests and tokens per minute; counted in this process, or in a Redis that several share.

Requests are counted in any minute, refused ones that were let in included. So are tokens, in the minute in which they
are reserved: what a request may need at most is taken when it comes, and what it did not use is given back at its end,
if that is within the minute. No crowd of long responses gets past the limit together, and no minute has more than it.

Redis is spoken to on threads of its own, so that the event loop never waits for it. While it cannot be reached, this
process counts for itself: limits still hold, if only here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.auth.ledger import Grant, Ledger, MemoryLedger, Unreachable, connect, whole_seconds
from bdh_batch.http.errors import RateLimited
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import RateLimiting

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 5.0  # after which a Redis that did not answer is asked again
THREADS = 8
TIDY_SECONDS = 1.0  # between looks for callers that can be forgotten
TIDY_MOST = 5000  # of them at a time: some milliseconds
PREFIX = "x-ratelimit-"
HEADERS = [f"{PREFIX}{part}-{of}" for of in ("requests", "tokens") for part in ("limit", "remaining", "reset")]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens that a request may use, and where they are counted."""

    ledger: Ledger
    grant: Grant
    tokens: int


class Rates:
    """Counts requests and tokens against each caller's limits.

    Raises:
        ConfigError: Redis cannot be reached.
    """

    def __init__(self, settings: RateLimiting, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._ledgers = Ledgers(settings.storage, metrics.rate_storage_failed)
        self._settling: set[asyncio.Task[None]] = set()

    async def count_request(self, caller: Caller, standing: dict[str, str]) -> None:
        """Counts one request; where `caller` stands is put into `standing`, as headers.

        Raises:
            RateLimited: it is one too many.
        """
        limit = self._limit(caller, "requests_per_minute")
        if limit is None:
            return
        _, grant = await self._ledgers.ask(partial(_take, "requests", caller, 1, limit))
        _report(standing, "requests", limit, grant)
        if not grant.granted:
            raise self._refusal(f"Rate limit reached: {limit} requests per minute.", grant)

    async def reserve(
        self, caller: Caller, tokens: int, standing: dict[str, str], param: str = "max_tokens"
    ) -> Reservation | None:
        """Takes `tokens`, which `param` has asked for, from what `caller` has left; None where it has no limit.

        Raises:
            InvalidRequest: the limit is lower than that.
            RateLimited: not now.
        """
        limit = self._limit(caller, "tokens_per_minute")
        if limit is None:
            return None
        if tokens > limit:
            text = f"The request needs up to {tokens} tokens; the limit is {limit} per minute. Ask for fewer."
            raise InvalidRequest(text, param, "tokens_per_minute_exceeded")
        ledger, grant = await self._ledgers.ask(partial(_take, "tokens", caller, tokens, limit))
        _report(standing, "tokens", limit, grant)
        if not grant.granted:
            text = (
                f"Rate limit reached: {limit} tokens per minute; it needs up to {tokens}, {grant.remaining} are left."
            )
            raise self._refusal(text, grant)
        return Reservation(ledger, grant, tokens)

    def settle(self, reservation: Reservation, used: int) -> None:
        """Gives back what was reserved and not used; does not wait for that."""
        if used < reservation.tokens:
            unused = reservation.tokens - used
            task = asyncio.ensure_future(self._ledgers.ask(partial(_give_back, reservation, unused)))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def remaining(self, caller: Caller) -> dict[str, dict[str, int]]:
        """What `caller` has left of its limits in this minute, by their names; without those that it has not."""
        found = {}
        for kind in ("requests", "tokens"):
            if (limit := self._limit(caller, f"{kind}_per_minute")) is not None:
                _, grant = await self._ledgers.ask(partial(_take, kind, caller, 0, limit))
                found[f"{kind}_per_minute"] = {"limit": limit, "remaining": grant.remaining}
        return found

    def _limit(self, caller: Caller, kind: str) -> int | None:
        """The key's own, else that of the settings, if they limit at all."""
        own: int | None = getattr(caller.key, kind, None)
        common: int | None = getattr(self._settings, kind) if self._settings.enabled else None
        return common if own is None else own

    def _refusal(self, text: str, grant: Grant) -> RateLimited:
        self._metrics.refused("rate_limit_exceeded")
        return RateLimited(text, retry_after=whole_seconds(grant.wait))


class Ledgers:
    """Where is counted. In memory at once, in Redis on a thread; if that fails, in memory until it answers again.

    Raises:
        ConfigError: Redis cannot be reached.
    """

    def __init__(self, url: str, failed: Callable[[], None]) -> None:
        self._failed = failed
        self._here = MemoryLedger()
        self._shared = None if url == "memory" else connect(url)
        self._threads = ThreadPoolExecutor(THREADS, "bdh-rates")
        self._away_until = 0.0
        self._tidying = False

    async def ask(self, work: Callable[[Ledger], T]) -> T:
        if self._shared is None or self._away:
            return self._ask_here(work)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask_shared, work)
        except Unreachable as error:
            if not self._away:
                self._away_until = time.monotonic() + RETRY_SECONDS
                log.warning("rate_limiting.storage does not answer, counting here meanwhile: %s", error)
            self._failed()
            return self._ask_here(work)

    @property
    def _away(self) -> bool:
        return time.monotonic() < self._away_until

    def _ask_shared(self, work: Callable[[Ledger], T]) -> T:
        assert self._shared is not None
        if self._away:  # found out while this one waited for a thread
            raise Unreachable("it did not answer another request")
        return work(self._shared)

    def _ask_here(self, work: Callable[[Ledger], T]) -> T:
        result = work(self._here)
        self._tidy_later()
        return result

    def _tidy_later(self) -> None:
        """Callers that have not come again are forgotten even if no other request comes."""
        if len(self._here) and not self._tidying:
            self._tidying = True
            asyncio.get_running_loop().call_later(TIDY_SECONDS, self._tidy)

    def _tidy(self) -> None:
        self._tidying = False
        self._here.forget(TIDY_MOST)
        self._tidy_later()


def _take(kind: str, caller: Caller, amount: int, limit: int, ledger: Ledger) -> tuple[Ledger, Grant]:
    return ledger, ledger.take(f"{kind}/{caller.label}", amount, limit, own_log=caller.key is not None)


def _give_back(reservation: Reservation, tokens: int, ledger: Ledger) -> None:
    """Only where they were taken."""
    if ledger is reservation.ledger:
        ledger.give_back(reservation.grant, tokens)


def _report(standing: dict[str, str], of: str, limit: int, grant: Grant) -> None:
    parts = {"limit": str(limit), "remaining": str(grant.remaining), "reset": f"{whole_seconds(grant.wait)}s"}
    standing.update({f"{PREFIX}{part}-{of}": value for part, value in parts.items()})
