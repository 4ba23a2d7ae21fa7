"""Caches of bytes by key, which forget what is too old: in this process's memory, or in a Redis that servers share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from cachetools import TTLCache

from bdh_batch.errors import BDHError, ConfigError
from bdh_batch.settings import ResponseCache, without_password

REDIS_PREFIX = "bdh:responses:"
REDIS_SECONDS = 0.5  # within which it has to answer
KEY_BYTES = 200  # what an entry takes beside its value, about


class Unreachable(BDHError):
    """A cache does not answer. Raised to whoever then does without it; no client sees it."""


class ByteCache(Protocol):
    """A cache of bytes by key."""

    async def get(self, key: str) -> bytes | None:
        """Returns what is cached. Raises Unreachable."""

    async def put(self, key: str, value: bytes) -> None:
        """Caches a value. Raises Unreachable."""

    @property
    def held(self) -> int:
        """Bytes of this process's memory that it takes."""

    async def close(self) -> None:
        """Closes connections. Idempotent."""


class MemoryCache:
    """A cache in memory, without what was used least recently where it would take more than `most` bytes."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._values: TTLCache[str, bytes] = TTLCache(most, seconds, clock, lambda value: len(value) + KEY_BYTES)

    async def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    async def put(self, key: str, value: bytes) -> None:
        if len(value) + KEY_BYTES <= self._values.maxsize:
            self._values[key] = value

    @property
    def held(self) -> int:
        return int(self._values.currsize)

    async def close(self) -> None:
        """There is nothing to close."""


class RedisCache:
    """A cache in a Redis, whose own `maxmemory` bounds it."""

    def __init__(self, url: str, seconds: float) -> None:
        from redis.asyncio import Redis

        self._seconds = seconds
        self._redis = Redis.from_url(url, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS)

    async def get(self, key: str) -> bytes | None:
        from redis import RedisError

        try:
            found: bytes | None = await self._redis.get(REDIS_PREFIX + key)
        except (RedisError, OSError) as error:
            raise Unreachable(str(error)) from error
        return found

    async def put(self, key: str, value: bytes) -> None:
        from redis import RedisError

        try:
            await self._redis.set(REDIS_PREFIX + key, value, px=max(1, int(self._seconds * 1000)))
        except (RedisError, OSError) as error:
            raise Unreachable(str(error)) from error

    @property
    def held(self) -> int:
        return 0

    async def close(self) -> None:
        await self._redis.aclose()


def open_byte_cache(chosen: ResponseCache) -> ByteCache:
    """Returns the cache of the settings. Raises ConfigError: a library is missing, or nothing answers."""
    if chosen.storage == "memory":
        return MemoryCache(chosen.max_bytes, chosen.ttl_seconds)
    url = chosen.storage.replace("redis+unix://", "unix://", 1)
    try:
        from redis import Redis, RedisError
    except ImportError as error:
        raise ConfigError("response_cache.storage: Redis needs a package: pip install 'bdh-batch[redis]'") from error
    try:
        with Redis.from_url(url, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS) as client:
            client.ping()
    except (RedisError, ValueError):
        text = f"nothing answers at {without_password(chosen.storage)}"
        raise ConfigError(f"response_cache.storage: {text}") from None
    return RedisCache(url, chosen.ttl_seconds)
