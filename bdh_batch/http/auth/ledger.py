"""Counts what each caller takes, such that in no minute, wherever it begins, anyone takes more than a limit.

Time is cut into slots of a quarter of a second. What is taken in a slot counts until a minute after the end of that
slot: never for less than a minute, and never for more than 60.25 s. What is given back is given back to the slot in
which it was taken, while that still counts; later, it is nobody's.

`MemoryLedger` counts in this process, by a clock that never goes back. `RedisLedger` counts in a Redis that servers
share, by that Redis' clock.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bdh_batch.errors import ConfigError
from bdh_batch.settings import without_password

if TYPE_CHECKING:
    from redis import Redis

SLOTS = 4  # in a second
RETAINED = 60 * SLOTS  # slots for which a slot counts after its end
MOST_NAMES = 100_000  # that have a log of their own in memory, some 70 MB
SHARED = 4096  # logs of those that come when there are so many
FORGET = 4  # names that are looked at, at most, when one takes: more than one, so that they become fewer
REDIS_SECONDS = 1.0  # that Redis may take to answer
REDIS_PREFIX = "bdh:rate:"


class Unreachable(Exception):
    """Redis does not respond; requests are counted in memory meanwhile."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What came of asking. `name` and `slot` are where it is counted, and `wait` is how many seconds pass until so much
    is available, or, where it is granted, until some of what was taken is free again."""

    granted: bool
    remaining: int
    wait: float
    name: str | int
    slot: int


class Ledger(Protocol):
    """All its methods raise Unreachable."""

    def take(self, name: str, amount: int, limit: int, own_log: bool) -> Grant:
        """Counts `amount` for `name` unless that is more than `limit` in a minute; nothing of it, then.

        Args:
            own_log: whether `name` never shares a log with others, of which there must be few such.
        """

    def give_back(self, grant: Grant, amount: int) -> None:
        """So much of what was granted is not used. It is of no effect once the grant does not count any more."""


class MemoryLedger:
    """Takes constant time, and bounded memory: names that have taken nothing for a minute are forgotten.

    Where more than `most` names are known, new ones share `SHARED` logs until there are fewer: they are then refused
    too early perhaps, but never let past a limit.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, most: int = MOST_NAMES) -> None:
        self._clock = clock
        self._most = most
        self._logs: OrderedDict[str | int, dict[int, int]] = OrderedDict()  # amounts by slot; the most recent is last

    def __len__(self) -> int:
        return len(self._logs)

    def take(self, name: str, amount: int, limit: int, own_log: bool) -> Grant:
        now = self._clock() * SLOTS
        slot = int(now)
        self.forget(FORGET)
        of = name if own_log else self._log_of(name)
        log = self._logs.get(of, {})
        for old in [known for known in log if known + RETAINED < slot]:
            del log[old]
        grant = judge(log, amount, limit, now, of)
        if grant.granted and amount:
            log[slot] = log.get(slot, 0) + amount
            self._logs[of] = log
            self._logs.move_to_end(of)
        return grant

    def give_back(self, grant: Grant, amount: int) -> None:
        log = self._logs.get(grant.name, {})
        if grant.slot in log:
            log[grant.slot] -= amount

    def forget(self, most: int) -> None:
        """Forgets up to `most` of those that have taken nothing for a minute."""
        slot = int(self._clock() * SLOTS)
        for _ in range(most):
            oldest = next(iter(self._logs), None)
            if oldest is None or next(reversed(self._logs[oldest]), 0) + RETAINED >= slot:
                return
            del self._logs[oldest]

    def _log_of(self, name: str) -> str | int:
        """Once it shares a log, a name does so until nothing of what it took there counts."""
        shared = hash(name) % SHARED
        alone = name in self._logs or (shared not in self._logs and len(self._logs) < self._most)
        return name if alone else shared


class RedisLedger:
    """Counts in Redis, which decides by a script, and so for all its servers in turn."""

    # What is of the future was counted before the clock was put back: it counts as taken now.
    _TAKE = f"""
        local name, amount, limit = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
        local now = redis.call('TIME')
        local slot = math.floor((now[1] + now[2] / 1000000) * {SLOTS})
        local known, kept, total = redis.call('HGETALL', name), {{}}, 0
        for at = 1, #known, 2 do
            local when, taken = tonumber(known[at]), tonumber(known[at + 1])
            if when + {RETAINED} < slot or when > slot then
                redis.call('HDEL', name, known[at])
            end
            if when > slot then
                redis.call('HINCRBY', name, string.format('%d', slot), taken)
            end
            if when + {RETAINED} >= slot then
                total = total + taken
                kept[#kept + 1], kept[#kept + 2] = math.min(when, slot), taken
            end
        end
        if amount > 0 and total + amount <= limit then
            redis.call('HINCRBY', name, string.format('%d', slot), amount)
            redis.call('EXPIRE', name, {RETAINED // SLOTS + 2})
        end
        return {{now[1], now[2], kept}}
    """
    _GIVE_BACK = """
        if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then
            redis.call('HINCRBY', KEYS[1], ARGV[1], -ARGV[2])
        end
    """

    def __init__(self, client: Redis) -> None:
        self.client = client
        self._take = client.register_script(self._TAKE)
        self._give_back = client.register_script(self._GIVE_BACK)

    def take(self, name: str, amount: int, limit: int, own_log: bool) -> Grant:
        seconds, microseconds, kept = self._run(self._take, name, amount, limit)
        log: dict[int, int] = {}
        for slot, taken in zip(kept[::2], kept[1::2], strict=True):
            log[slot] = log.get(slot, 0) + taken
        return judge(log, amount, limit, (int(seconds) + int(microseconds) / 1e6) * SLOTS, name)

    def give_back(self, grant: Grant, amount: int) -> None:
        self._run(self._give_back, str(grant.name), grant.slot, amount)

    def _run(self, script: Callable[..., Any], name: str, *arguments: int) -> Any:
        from redis import RedisError

        try:
            return script(keys=[REDIS_PREFIX + name], args=arguments)
        except RedisError as error:
            raise Unreachable(str(error)) from error


def connect(url: str) -> RedisLedger:
    """Raises ConfigError: the library is missing, or nothing answers there."""
    try:
        from redis import Redis, RedisError
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise ConfigError("rate_limiting.storage: Redis needs a package: pip install 'bdh-batch[redis]'") from error
    try:
        client = Redis.from_url(
            url.replace("redis+unix://", "unix://", 1),
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a connection may have died of idleness
        )
        client.ping()
    except (RedisError, ValueError):
        raise ConfigError(f"rate_limiting.storage: nothing answers at {without_password(url)}") from None
    return RedisLedger(client)


def judge(log: Mapping[int, int], amount: int, limit: int, now: float, name: str | int) -> Grant:
    """Whether `amount` can be taken, by what was taken in each slot that counts. `now` is in slots."""
    left = limit - sum(log.values())
    if granted := amount <= left:
        oldest, left = min(log, default=int(now)), left - amount
    else:
        oldest = _freed(sorted(log.items()), amount - left)
    return Grant(granted, max(0, left), (oldest + 1 + RETAINED - now) / SLOTS, name, int(now))


def _freed(taken: Iterable[tuple[int, int]], needed: int) -> int:
    """The slot with which, from the oldest on, so much is free again."""
    for slot, amount in taken:
        needed -= amount
        if needed <= 0:
            return slot
    raise AssertionError("a limit is smaller than what was asked for")


def whole_seconds(wait: float) -> int:
    return min(RETAINED // SLOTS, max(1, math.ceil(wait)))
