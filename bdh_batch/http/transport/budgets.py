"""Bounds the memory and file descriptors that clients may take before their requests are admitted."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Protocol

from bdh_batch.errors import Unavailable
from bdh_batch.http.auth.caller import UNIX, network_of
from bdh_batch.http.errors import TooManyConnections
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Limits
from bdh_batch.system.freed_memory import FREED_MEMORY, WORTH_RETURNING

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 32768
RESERVED_DESCRIPTORS = 256  # for all that is no connection: files, pipes, the event loop, connections being refused
RETRY_SECONDS = 2
QUIET_SECONDS = 10.0  # between two lines in the log about the same shortage
ROOM = 1 / 8  # of a full buffer budget is freed at once, so that looking for the largest holder stays rare


class Occasionally:
    """Logs a warning, and then stays quiet for `QUIET_SECONDS`, so that a flood of clients is no flood of lines."""

    def __init__(self) -> None:
        self._next = 0.0

    def warn(self, message: str, *arguments: object) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + QUIET_SECONDS
            log.warning(message, *arguments)


class Holder(Protocol):
    """A connection that holds bytes of requests."""

    held: int  # bytes that the budget counts for it

    @property
    def sheddable(self) -> bool:
        """Whether it holds bytes of a request that has not come whole."""

    def shed(self, error: Unavailable) -> None:
        """Frees those bytes, and responds to their request with `error`."""


class BufferBudget:
    """Bounds the bytes of requests that all connections hold together.

    A body counts from its arrival until its request has been answered. When the budget is full, the largest requests
    that have not come whole yet are refused, of any client: small requests get in beside those that hold large
    bodies open.
    """

    def __init__(self, most: int, holders: Iterable[Holder], metrics: Metrics) -> None:
        self._most = most
        self._holders = holders
        self._metrics = metrics
        self._held = self._peak = 0
        metrics.watch_buffered(lambda: self._held)

    def update(self, holder: Holder, held: int) -> None:
        """Counts `held` bytes for `holder` from now on, and makes room if that is too much."""
        more = held - holder.held
        self._held += more
        holder.held = held
        self._peak = max(self._peak, self._held)
        if more > 0:
            if self._held > self._most:
                self._make_room()
        elif self._peak - self._held > WORTH_RETURNING:
            self._peak = self._held
            FREED_MEMORY.return_soon()

    def check(self) -> None:
        """Raises Unavailable while the budget is full."""
        if self._held > self._most:
            self._metrics.refused("buffered_bytes")
            raise self._full()

    def _make_room(self) -> None:
        goal = self._most * (1 - ROOM)
        for holder in sorted((each for each in self._holders if each.sheddable), key=lambda each: -each.held):
            if self._held <= goal:
                break
            self._metrics.refused("buffered_bytes")
            holder.shed(self._full())

    def _full(self) -> Unavailable:
        text = f"The request bodies that are held exceed the limit of {self._most} bytes"
        return Unavailable(f"{text} (limits.max_buffered_bytes).", retry_after=RETRY_SECONDS)


class WriteDeadline:
    """Ends a connection whose client takes nothing of what is written for too long.

    Args:
        seconds: in which it has to take something.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport, self._seconds = transport, seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        waiting = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look, waiting)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, waited: int) -> None:
        if self._transport.get_write_buffer_size() < waited:
            self.start()
        else:
            self._transport.abort()


class ConnectionBudget:
    """Bounds the connections that are open, in all and from one address (of IPv6: one /64 network).

    Args:
        proxies: networks, and perhaps `unix`, whose connections are other clients' and count in all only.
    """

    def __init__(self, limits: Limits, proxies: Iterable[str], metrics: Metrics) -> None:
        self._most = connections_within_descriptors(limits.max_connections)
        self._each = limits.max_connections_per_address or max(1, self._most // 2)
        self._proxies = [ip_network(text, strict=False) for text in proxies if text != UNIX]
        self._metrics = metrics
        self._by_address: Counter[str] = Counter()
        self._open = 0
        self._warnings = Occasionally()
        metrics.watch_connections(lambda: self._open)

    def enter(self, address: str) -> Callable[[], None]:
        """Counts one more connection from `address`, the empty string where it has none; call the result, once, when
        it has ended.

        Raises:
            Unavailable: there are too many in all.
            TooManyConnections: there are too many from there.
        """
        if self._open >= self._most:
            self._metrics.refused("connections")
            self._warnings.warn("refusing connections: %d are open (limits.max_connections, ulimit -n)", self._open)
            text = f"Too many open connections; the limit is {self._most} (limits.max_connections)."
            raise Unavailable(text, RETRY_SECONDS)
        label = self._label(address)
        if label and self._by_address[label] >= self._each:
            self._metrics.refused("connections_per_address")
            text = f"Too many open connections from this address; the limit is {self._each}"
            raise TooManyConnections(f"{text} (limits.max_connections_per_address).", RETRY_SECONDS)
        self._open += 1
        self._by_address[label] += 1
        return lambda: self._leave(label)

    def _leave(self, label: str) -> None:
        self._open -= 1
        self._by_address[label] -= 1
        if not self._by_address[label]:
            del self._by_address[label]

    def _label(self, address: str) -> str:
        """What connections count under; those of no particular client under the empty string."""
        try:
            known = _unmapped(ip_address(address))
        except ValueError:
            return ""
        if any(known in network for network in self._proxies):
            return ""
        return network_of(address)


def _unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def connections_within_descriptors(wanted: int | None) -> int:
    """How many connections the process may have: `wanted`, or MOST_CONNECTIONS where it is not set, or as many as file
    descriptors allow. Raises its limit of those as far as needed, and warns where fewer fit than are wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    goal = wanted or MOST_CONNECTIONS
    needed = goal + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = _raised(soft, hard, needed)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return goal
    fitting = max(soft // 2, soft - RESERVED_DESCRIPTORS)
    level = logging.INFO if wanted is None else logging.WARNING
    text = "limits.max_connections: %d fit into the %d files that this process may open (ulimit -n), not %d"
    log.log(level, text, fitting, soft, goal)
    return fitting


def _raised(soft: int, hard: int, needed: int) -> int:
    """The limit after it was raised to `needed`, or as far as can be."""
    target = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, target), hard))
    except (OSError, ValueError) as error:  # some systems allow less than they say
        log.info("the limit of %d open files cannot be raised (%s)", soft, error)
        return soft
    return max(soft, target)
