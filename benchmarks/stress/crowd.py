"""The soak's crowd of clients, and the ends that their requests came to."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter, defaultdict
from functools import partial

from tqdm import tqdm

from benchmarks.stress.clients import KINDS, LEFT, REFUSED, Target, meet, never_reads
from benchmarks.stress.watched import Watched

FOR_EVER = 1e9
STATUES = 3  # clients that do not read from the first byte to the last
MOST_FAULTS = 200  # more need no further proof
SAMPLES = 240
INJECTED = (
    "The step that computed this request failed.",
    "The model's output contains NaN or infinite values.",
    "There is not enough memory for the request.",
)

Ends = defaultdict[str, Counter[str]]


class Soak:
    """A crowd of clients, and the ends that they came to.

    Args:
        injected: whether the server is made to fail, so that some ends are no faults.
        disconnects: how many clients are to leave; None is a crowd of all kinds.
    """

    def __init__(self, target: Target, clients: int, seed: int, injected: bool, disconnects: int | None) -> None:
        self._target = target
        self._clients = clients
        self._draw = random.Random(seed)
        self._expected = {f"{how} {text}" for how in ("event", "500") for text in INJECTED} if injected else set()
        self._disconnects = disconnects
        self._weights = [kind.weight if disconnects is None else kind.disconnects for kind in KINDS.values()]
        self.ends: Ends = defaultdict(Counter)
        self.faults: Counter[str] = Counter()

    @property
    def requests(self) -> int:
        return sum(ends.total() for ends in self.ends.values())

    @property
    def left(self) -> int:
        return sum(ends[LEFT] for ends in self.ends.values())

    async def run(self, seconds: float) -> None:
        """So long, or until enough have left; nobody is there any more afterwards."""
        over = self._target.over
        over.clear()
        timer = asyncio.get_running_loop().call_later(seconds, over.set)
        await asyncio.gather(*(self._statue() for _ in range(STATUES)), *(self._client() for _ in range(self._clients)))
        timer.cancel()

    async def _client(self) -> None:
        while not self._target.over.is_set():
            name = self._draw.choices(list(KINDS), self._weights)[0]
            end = await meet(KINDS[name].habit, self._target, random.Random(self._draw.random()))
            self._count(name, end)
            if end == REFUSED:
                await asyncio.sleep(self._draw.uniform(0.05, 0.5))

    async def _statue(self) -> None:
        end = await meet(partial(never_reads, seconds=FOR_EVER), self._target, random.Random(self._draw.random()))
        self._count("never reads", end)

    def _count(self, name: str, end: str) -> None:
        self.ends[name][end] += 1
        if end not in KINDS[name].ends | self._expected | {REFUSED}:
            self.faults[fault := f"{name}: {end}"] += 1
            tqdm.write(fault, file=sys.stderr)
        enough = self._disconnects is not None and self.left >= self._disconnects
        if enough or self.faults.total() >= MOST_FAULTS:
            self._target.over.set()


class Watch:
    """Looks at the process again and again while it serves, and shows how the soak gets on."""

    def __init__(self, server: Watched, soak: Soak, seconds: float) -> None:
        self._server, self._soak, self._seconds = server, soak, seconds
        self.samples: list[dict[str, int]] = []

    async def run(self) -> None:
        with tqdm(total=self._seconds, unit="s", bar_format="{l_bar}{bar}{postfix}", file=sys.stderr) as bar:
            began = time.monotonic()
            while True:
                self.samples.append(sample := self._server.sample())
                megabytes = sample.get("rss", 0) >> 20
                text = f"{self._soak.requests} requests, {self._soak.left} left, {self._soak.faults.total()} faults"
                bar.set_postfix_str(f"{text}, {megabytes} MiB", refresh=False)
                bar.update(min(self._seconds, time.monotonic() - began) - bar.n)
                await asyncio.sleep(self._seconds / SAMPLES)
