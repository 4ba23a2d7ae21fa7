"""States that are read from their files before anyone asks for them, as long as the engine has nothing else to do.

All of it happens in the worker's thread, but for the reading itself, which stops where a request comes. So it takes no
time of a step, and no request waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future
from functools import partial

from bdh_batch.engine.state_traffic import INTERRUPTED, Post, StateIO
from bdh_batch.messages import SavedState
from bdh_batch.messages.state import Warmed
from bdh_batch.scheduler.scheduler import Scheduler, Update
from bdh_batch.scheduler.sequence import Prefix
from bdh_batch.scheduler.transfers import NO_SLOT, Load

Outcome = Future[Warmed]


class Warming:
    """Reads states one at a time, and has them cached as prefixes.

    Args:
        states: reads them; None where there are no transfer slots.
    """

    def __init__(self, scheduler: Scheduler, states: StateIO | None, post: Post) -> None:
        self._scheduler = scheduler
        self._states = states
        self._post = post
        self._wanted: deque[tuple[Load, Outcome]] = deque()  # of the first one, the read may have begun
        self._reads = False

    def add(self, state: SavedState, tokens: bytes, prefix: Prefix, outcome: Outcome) -> list[Update]:
        """Has the state after packed `tokens` read, and cached as one of a request with `prefix`; then `outcome` is
        settled."""
        self._wanted.append((Load(state, tokens, self._scheduler.sharing.namespace_of(prefix)), outcome))
        return []

    def go_on(self) -> None:
        """Begins to read the next state. The engine has nothing to do."""
        while self._wanted and not self._reads:
            load, outcome = self._wanted[0]
            if not (outcome.running() or outcome.set_running_or_notify_cancel()):
                self._wanted.popleft()  # nobody wants it any more
            elif self._states is None:
                self._settle("no room")
            elif (how := self._scheduler.sharing.warmed(load)) is not None:
                self._settle(how)
            elif (slot := self._scheduler.transfers.take_spare()) is None:
                return  # until one is free
            else:
                load.slot, self._reads = slot, True
                self._states.read_ahead(load, partial(self._done, load), self._is_idle)

    def _is_idle(self) -> bool:
        return not self._scheduler.has_work

    def _done(self, load: Load, error: str | None) -> None:
        """Is called in another thread."""
        self._post(partial(self._was_read, load, error))

    def _was_read(self, load: Load, error: str | None) -> list[Update]:
        self._reads = False
        if error is None:
            self._settle(self._scheduler.sharing.warm(load))
            return []
        self._scheduler.transfers.give([load.slot], time.monotonic())
        load.slot = NO_SLOT
        if error != INTERRUPTED:  # else it is read once the engine is idle again
            self._settle("unreadable")
        return []

    def _settle(self, how: Warmed) -> None:
        _, outcome = self._wanted.popleft()
        outcome.set_result(how)
