"""Whether something outside this machine is asked at all: while it does not respond, one probe in the background is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from bdh_batch.errors import StoreFailed

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0  # between two probes


class Unreachable(StoreFailed):
    """500: raised where a shared store does not respond, or has not done so a short while ago."""


class Circuit:
    """Refuses calls from a failure until a probe succeeds, so that no request waits for what does not respond.

    Its methods are to be called on the event loop, but for `check`.

    Args:
        name: of what is asked.
        errors: that say of a call that there was no response.
        probe: asks for something. What it raises as StoreFailed says that there is no response yet.
    """

    def __init__(
        self,
        name: str,
        errors: tuple[type[Exception], ...],
        probe: Callable[[], Awaitable[object]],
        seconds: float = RETRY_SECONDS,
    ) -> None:
        self.errors = errors
        self._name = name
        self._probe = probe
        self._seconds = seconds
        self._probing: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls are refused."""
        return self._probing is not None

    def check(self) -> None:
        """Raises Unreachable while calls are refused."""
        if self.is_open:
            raise Unreachable(f"{self._name} cannot be reached.")

    def open(self, problem: str) -> None:
        """Refuses calls until a probe succeeds. Idempotent."""
        if self._probing is None:
            log.warning("%s cannot be reached, and is asked again every %g s: %s", self._name, self._seconds, problem)
            self._probing = asyncio.create_task(self._probe_until_it_responds())

    def close(self) -> None:
        """Ends the probes. Idempotent."""
        if self._probing is not None:
            self._probing.cancel()

    async def _probe_until_it_responds(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._probe()
            except StoreFailed:
                continue
            log.warning("%s responds again", self._name)
            self._probing = None
            return
