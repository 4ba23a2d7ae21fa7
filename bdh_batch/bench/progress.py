"""How far a run is: a line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TextIO

TERMINAL_SECONDS = 0.5
PLAIN_SECONDS = 10.0


@dataclass
class Tally:
    """What is counted while it happens."""

    wanted: int
    completed: int = 0
    failed: int = 0
    running: int = 0
    tokens: int = 0

    def count(self, tokens: int) -> None:
        self.tokens += tokens


class Progress:
    """Shows a tally until the block's end."""

    def __init__(self, tally: Tally, out: TextIO, silent: bool) -> None:
        self._tally, self._out, self._silent = tally, out, silent
        self._live = not silent and out.isatty()

    async def __aenter__(self) -> Progress:
        self._began = time.perf_counter()
        self._last = (self._began, 0)
        self._task = None if self._silent else asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            self._show()
            if self._live:
                print(file=self._out)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TERMINAL_SECONDS if self._live else PLAIN_SECONDS)
            self._show()

    def _show(self) -> None:
        before, after = ("\r", "\x1b[K") if self._live else ("", "\n")
        print(before + self._line(time.perf_counter()), end=after, file=self._out, flush=True)

    def _line(self, now: float) -> str:
        tally, (then, tokens) = self._tally, self._last
        self._last = (now, tally.tokens)
        ended, speed = tally.completed + tally.failed, (tally.tokens - tokens) / max(now - then, 1e-9)
        return (
            f"{ended}/{tally.wanted} requests, {tally.failed} failed, {tally.running} under way, "
            f"{speed:.0f} tokens/s, {now - self._began:.0f} s"
        )
