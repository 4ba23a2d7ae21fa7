"""How often, and how much, each caller may ask in a minute; counted in this process, or in a Redis that several share.

Requests are counted in any minute, refused ones that were let in included. Tokens are counted in minutes that begin
with a caller's first request, as they are reserved: what a request may need at most is taken when it comes, and what it
did not use is given back at its end, so that no crowd of long answers gets past the limit together.

Redis is spoken to on threads of its own, so that the event loop never waits for it. While it cannot be reached, this
process counts for itself: limits still hold, if only here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage, Storage
from limits.strategies import MovingWindowRateLimiter

from bdh_batch.errors import ConfigError, InvalidRequest
from bdh_batch.http.caller import Caller
from bdh_batch.http.errors import RateLimited
from bdh_batch.settings import RateLimiting, without_password
from bdh_batch.telemetry import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")

MINUTE = 60  # seconds
REDIS_SECONDS = 1.0  # that it may take to answer
RETRY_SECONDS = 5.0  # after which one that did not is asked again
THREADS = 8
SAME = 2.0  # seconds that two readings of one window's end may differ: Redis tells whole ones
PREFIX = "x-ratelimit-"
HEADERS = [f"{PREFIX}{part}-{of}" for of in ("requests", "tokens") for part in ("limit", "remaining", "reset")]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens that a request may use: where they are counted, and until when (Unix seconds)."""

    storage: Storage
    window: str
    until: float
    tokens: int


class Rates:
    """
    Raises:
        ConfigError: Redis cannot be reached.
    """

    def __init__(self, settings: RateLimiting, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._ledger = Ledger(settings.storage, metrics.rate_storage_failed)
        self._settling: set[asyncio.Task[None]] = set()

    async def count_request(self, caller: Caller, standing: dict[str, str]) -> None:
        """Counts one request; where `caller` stands is put into `standing`, as headers.

        Raises:
            RateLimited: it is one too many.
        """
        item = self._limit(caller, "requests_per_minute")
        if item is None:
            return
        allowed, remaining, wait = await self._ledger.ask(partial(_hit, item, caller.label))
        _tell(standing, "requests", item.amount, remaining, wait)
        if not allowed:
            raise self._refusal(f"Limited to {item.amount} requests a minute.", wait)

    async def reserve(
        self, caller: Caller, tokens: int, standing: dict[str, str], param: str = "max_tokens"
    ) -> Reservation | None:
        """Takes `tokens`, which `param` has asked for, from what `caller` has left; None where it has no limit.

        Raises:
            InvalidRequest: so many are not to be had in any minute.
            RateLimited: not now.
        """
        item = self._limit(caller, "tokens_per_minute")
        if item is None:
            return None
        if tokens > item.amount:
            text = f"The request may need {tokens} tokens, and {item.amount} a minute are all there is; ask for fewer."
            raise InvalidRequest(text, param, "tokens_per_minute_exceeded")
        reservation, remaining, wait = await self._ledger.ask(partial(_reserve, item, caller.label, tokens))
        _tell(standing, "tokens", item.amount, remaining, wait)
        if reservation is None:
            text = f"Limited to {item.amount} tokens a minute: the request may need {tokens}, {remaining} are left."
            raise self._refusal(text, wait)
        return reservation

    def settle(self, reservation: Reservation, used: int) -> None:
        """Gives back what was reserved and not used; does not wait for that."""
        if used < reservation.tokens:
            task = asyncio.ensure_future(self._ledger.ask(partial(_give_back, reservation, reservation.tokens - used)))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    def _limit(self, caller: Caller, kind: str) -> RateLimitItem | None:
        """The key's own, else that of the settings, if they limit at all."""
        amount = getattr(caller.key, kind, None)
        if amount is None and self._settings.enabled:
            amount = getattr(self._settings, kind)
        return None if amount is None else RateLimitItemPerMinute(amount)

    def _refusal(self, text: str, wait: int) -> RateLimited:
        self._metrics.refused("rate_limit_exceeded")
        return RateLimited(text, retry_after=wait)


class Ledger:
    """Where is counted. In memory at once, in Redis on a thread; if that fails, in memory until it answers again."""

    def __init__(self, url: str, failed: Callable[[], None]) -> None:
        self._failed = failed
        self._spare = MemoryStorage()
        self._shared = None if url == "memory" else connect(url)
        self._threads = ThreadPoolExecutor(THREADS, "bdh-rates")
        self._away_until = 0.0

    async def ask(self, work: Callable[[Storage], T]) -> T:
        if self._shared is None or self._away:
            return work(self._spare)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask_shared, work)
        except StorageError as error:
            if not self._away:
                self._away_until = time.monotonic() + RETRY_SECONDS
                log.warning("rate_limiting.storage does not answer, counting here meanwhile: %s", error)
            self._failed()
            return work(self._spare)

    @property
    def _away(self) -> bool:
        return time.monotonic() < self._away_until

    def _ask_shared(self, work: Callable[[Storage], T]) -> T:
        assert self._shared is not None
        if self._away:  # found out while this one waited for a thread
            raise StorageError(TimeoutError("it did not answer another request"))
        return work(self._shared)


def connect(url: str) -> RedisStorage:
    """Raises ConfigError: the library is missing, or nothing answers there."""
    try:
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise ConfigError("rate_limiting.storage: Redis needs a package: pip install 'bdh-batch[redis]'") from error
    storage = RedisStorage(
        url,
        key_prefix="bdh",
        wrap_exceptions=True,
        socket_timeout=REDIS_SECONDS,
        socket_connect_timeout=REDIS_SECONDS,
        retry=Retry(NoBackoff(), 1),  # type: ignore[arg-type]  # a connection may have died of idleness
    )
    if not storage.check():
        raise ConfigError(f"rate_limiting.storage: nothing answers at {without_password(url)}")
    return storage


def _hit(item: RateLimitItem, who: str, storage: Storage) -> tuple[bool, int, int]:
    limiter = MovingWindowRateLimiter(storage)
    allowed = limiter.hit(item, who)
    window = limiter.get_window_stats(item, who)
    return allowed, window.remaining, _seconds_until(window.reset_time)


def _reserve(item: RateLimitItem, who: str, tokens: int, storage: Storage) -> tuple[Reservation | None, int, int]:
    window = item.key_for(who, "tokens")
    taken = storage.incr(window, MINUTE, tokens)
    until = storage.get_expiry(window)
    if taken <= item.amount:
        return Reservation(storage, window, until, tokens), item.amount - taken, _seconds_until(until)
    taken = storage.incr(window, MINUTE, -tokens)
    return None, max(0, item.amount - taken), _seconds_until(until)


def _give_back(reservation: Reservation, tokens: int, storage: Storage) -> None:
    """A window that has ended since, or was counted elsewhere, has nothing to take back."""
    if storage is reservation.storage and abs(storage.get_expiry(reservation.window) - reservation.until) < SAME:
        storage.incr(reservation.window, MINUTE, -tokens)


def _seconds_until(when: float) -> int:
    return min(MINUTE, max(1, math.ceil(when - time.time())))


def _tell(standing: dict[str, str], of: str, limit: int, remaining: int, wait: int) -> None:
    parts = {"limit": str(limit), "remaining": str(remaining), "reset": f"{wait}s"}
    standing.update({f"{PREFIX}{part}-{of}": value for part, value in parts.items()})
