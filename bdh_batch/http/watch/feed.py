"""The last samples of the server, and who watches them: each is encoded once, for all watchers.

A watcher that reads slowly loses samples; nothing waits for it, and no more than a few are held for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import orjson

from bdh_batch.errors import Unavailable
from bdh_batch.http.errors import RateLimited
from bdh_batch.observability.figures import TenantFigures

SECONDS = 2.0  # between two samples
LENGTH = int(15 * 60 / SECONDS)  # samples that are kept
WATCHERS, WATCHERS_EACH = 32, 8  # at a time, of all callers and of one; operators have room whatever others take
HELD = 8  # events that are held for a watcher that reads slowly
RETRY_SECONDS = 10

Details = Mapping[str, object]


class Watcher:
    """One open stream of samples."""

    def __init__(self, first: bytes) -> None:
        self._events = deque([first], maxlen=HELD)
        self._changed = asyncio.Event()
        self._changed.set()
        self.closed = False
        self.is_operator = False  # who also gets details

    def put(self, event: bytes) -> None:
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """Its stream ends. Idempotent."""
        self.closed = True
        self._changed.set()

    async def take(self) -> bytes:
        """Waits for events, or for its end; returns those that have come, as server-sent events."""
        await self._changed.wait()
        self._changed.clear()
        events = b"".join(self._events)
        self._events.clear()
        return events


class Feed:
    """The samples of one server, as the process that responds has them."""

    def __init__(self) -> None:
        self.tenants: Mapping[str, TenantFigures] = {}  # by their labels, as of the last sample
        self._samples: deque[tuple[float, bytes]] = deque(maxlen=LENGTH)  # by their times, in Unix seconds
        self._watchers: Counter[str] = Counter()  # how many each caller has
        self._open: set[Watcher] = set()
        self._closed = False

    @property
    def watched_by_operators(self) -> bool:
        """Whether anybody gets details."""
        return any(watcher.is_operator for watcher in self._open)

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, time: float, sample: Mapping[str, object]) -> None:
        """One more sample; `time` is its own, in Unix seconds."""
        encoded = orjson.dumps(sample)
        self._samples.append((time, encoded))
        event = _event("sample", encoded)
        for watcher in self._open:
            watcher.put(event)

    def show(self, details: Details) -> None:
        """What operators see beside the samples, as it is now."""
        event = _event("details", orjson.dumps(details))
        for watcher in self._open:
            if watcher.is_operator:
                watcher.put(event)

    def since(self, time: float) -> Iterator[bytes]:
        """The samples after that time, in Unix seconds, in JSON."""
        return (sample for at, sample in self._samples if at > time)

    @contextmanager
    def watch(self, caller: str, since: float, is_operator: bool = False) -> Iterator[Watcher]:
        """A watcher that first gets what there is after a time. `caller` is its label.

        Raises:
            RateLimited: there are as many as may be.
            Unavailable: the server ends.
        """
        if self._closed:
            raise Unavailable("The server is shutting down.", retry_after=5)
        full = len(self._open) >= WATCHERS and not is_operator
        if full or self._watchers[caller] >= WATCHERS_EACH:
            text = f"At most {WATCHERS_EACH} pages of one caller, and {WATCHERS} in all, can watch at a time."
            raise RateLimited(text, retry_after=RETRY_SECONDS)
        watcher = Watcher(b"".join(_event("sample", sample) for sample in self.since(since)))
        self._open.add(watcher)
        self._watchers[caller] += 1
        try:
            yield watcher
        finally:
            self._open.discard(watcher)
            self._watchers[caller] -= 1
            if not self._watchers[caller]:
                del self._watchers[caller]

    def close(self) -> None:
        """Ends all streams, as the server drains. Idempotent."""
        self._closed = True
        for watcher in self._open:
            watcher.close()


def encoded_history(feed: Feed) -> bytes:
    """All samples that are kept, as one JSON object."""
    return b'{"seconds":%g,"samples":[%b]}' % (SECONDS, b",".join(feed.since(0.0)))


def _event(name: str, encoded: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encoded)
