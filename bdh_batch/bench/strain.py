"""Whether the client itself was the bottleneck: how busy it was, how late its event loop was, how late it sent.

uvloop's timers go by whole milliseconds: lateness below two of them is none.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bdh_batch.bench.figures import percentile

TICK = 0.005
BUSY = 0.8  # of the one core that a Python program has
LATE = 0.01


@dataclass(frozen=True)
class Strain:
    """Seconds; `cpu_share` of one core. `send_late_p99` is None where nothing was due at a time of its own."""

    cpu_share: float
    loop_late_median: float
    loop_late_p99: float
    send_late_p99: float | None

    def signs(self) -> list[str]:
        """Why the figures may say more of the client than of the server; nothing where they do not."""
        found = []
        if self.cpu_share >= BUSY:
            found.append(f"the client was busy {self.cpu_share:.0%} of the time")
        if self.loop_late_p99 >= LATE:
            found.append(f"its event loop was {1e3 * self.loop_late_p99:.0f} ms late, or more, 1 % of the time")
        if self.send_late_p99 is not None and self.send_late_p99 >= LATE:
            found.append(f"1 % of its requests were sent {1e3 * self.send_late_p99:.0f} ms late, or more")
        return found


def swallowed(late: float) -> list[float]:
    """How late each tick is that a stall kept from coming: that which ended it, and those that were due meanwhile. So
    each share of the ticks is that share of the time, and a long stall weighs as much as it lasted."""
    return [late - TICK * missed for missed in range(max(1, math.ceil(late / TICK)))]


class Watch:
    """Measures until the block's end."""

    def __init__(self) -> None:
        self._late: list[float] = []

    async def __aenter__(self) -> Watch:
        self._began, self._busy = time.perf_counter(), time.process_time()
        self._due = self._began + TICK
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        self._tick()
        self._share = (time.process_time() - self._busy) / (time.perf_counter() - self._began)

    async def _watch(self) -> None:
        while True:
            self._due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self._tick()

    def _tick(self) -> None:
        self._late += swallowed(max(0.0, time.perf_counter() - self._due))

    def strain(self, send_late: Sequence[float]) -> Strain:
        """With how late each request was sent, where each had its own time."""
        late = sorted(self._late)
        sent = percentile(sorted(send_late), 99) if send_late else None
        return Strain(self._share, percentile(late, 50), percentile(late, 99), sent)
