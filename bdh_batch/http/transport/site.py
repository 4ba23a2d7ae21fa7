"""The objects that all connections of a server share: the application, the budget, and the queue of turns."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from starlette.types import ASGIApp

from bdh_batch.http.transport.budgets import BufferBudget, Holder
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Limits

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.002
ROUND_TURNS = 8  # each may begin a request, whose work is done in the rounds that follow


class Turns:
    """Whose turn it is among connections that have sent more than they may have at once: a queue, first come, first
    served. A callback that has run has had its turn, and may ask for another one.

    What is new is looked at when it comes; what waits here shares a small part of every round of the event loop, so
    that a connection that asks for little is served at once, whatever number of others sends however much.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()

    def add(self, turn: Callable[[], object]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._round)
        self._waiting.append(turn)

    def _round(self) -> None:
        end = time.perf_counter() + ROUND_SECONDS
        for _ in range(min(ROUND_TURNS, len(self._waiting))):
            try:
                self._waiting[0]()  # it stays in the queue meanwhile, so that no second round is begun
            except Exception:
                log.exception("a connection's turn failed")
            self._waiting.popleft()
            if time.perf_counter() > end:
                break
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._round)


class Member(Holder, Protocol):
    """A connection, as the server sees it."""

    transport: asyncio.Transport

    def shutdown(self) -> None:
        """Lets the request that is being answered be the last."""


@dataclass
class Site:
    """The objects that all connections of a server share."""

    app: ASGIApp
    limits: Limits
    metrics: Metrics
    connections: set[Member] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.budget = BufferBudget(self.limits.max_buffered_bytes, self.connections, self.metrics)
        self.turns = Turns()
        self.empty = asyncio.Event()  # there is no connection
        self.empty.set()

    def enter(self, connection: Member) -> None:
        self.connections.add(connection)
        self.empty.clear()

    def leave(self, connection: Member) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self.empty.set()
