"""Sends all requests at their times, or as others end, and keeps what became of each."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from bdh_batch.bench import arrivals
from bdh_batch.bench.client import Client, Exchange
from bdh_batch.bench.data import Conversation
from bdh_batch.bench.options import Options
from bdh_batch.bench.outcome import Failed, Outcome
from bdh_batch.bench.progress import Progress, Tally
from bdh_batch.bench.strain import Strain, Watch

MILLISECOND, HOUR = 1e-3, 3600.0


@dataclass
class Measured:
    """What a run brought, in seconds of `time.perf_counter`; `outcomes` are those of requests that were begun."""

    began: float
    ended: float
    outcomes: list[Outcome]
    wanted: int
    interrupted: bool
    strain: Strain

    @property
    def duration(self) -> float:
        return self.ended - self.began

    @property
    def completed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.complete]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failure is not None]

    @property
    def unfinished(self) -> int:
        """Requests that were not sent, or under way, when the run was interrupted."""
        return self.wanted - len(self.completed) - len(self.failed)


def offsets(options: Options, said: Sequence[Conversation]) -> list[float]:
    """When each conversation begins, in seconds from the start: the rate is of requests, so those of several turns
    begin less often. Raises ConfigError where the rate cannot be."""
    per_request = len(said) / sum(map(len, said))
    if options.ramp_up_strategy is None:
        rate: float | arrivals.Ramp = options.request_rate * per_request
    else:
        start, end = options.ramp_up_start_rps or math.nan, options.ramp_up_end_rps or math.nan
        rate = arrivals.Ramp(options.ramp_up_strategy, start * per_request, end * per_request)
    return arrivals.offsets(len(said), rate, options.burstiness, options.seed)


async def measure(options: Options, client: Client, said: Sequence[Conversation], begins: Sequence[float]) -> Measured:
    """A run, of which each conversation begins at its offset; it ends early, with what there is, where it is
    cancelled."""
    tally = Tally(sum(map(len, said)))
    load = Load(options, client, said, tally)
    interrupted = False
    async with Watch() as watch, Progress(tally, sys.stderr, options.disable_tqdm):
        began = time.perf_counter()
        try:
            await load.run(began, begins)
        except asyncio.CancelledError:
            interrupted = True
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
        ended = time.perf_counter()
    outcomes = sorted(load.outcomes, key=lambda outcome: outcome.index)
    timed = options.max_concurrency is None
    late = [outcome.begun - outcome.due for outcome in outcomes if outcome.begun] if timed else []
    return Measured(began, ended, outcomes, tally.wanted, interrupted, watch.strain(late))


class Load:
    """One task for each conversation, begun at its time; `max_concurrency` of them get on at once."""

    def __init__(self, options: Options, client: Client, said: Sequence[Conversation], tally: Tally) -> None:
        self._options, self._client, self._said, self._tally = options, client, said, tally
        most = options.max_concurrency
        self._limit: AbstractAsyncContextManager[object] = nullcontext() if most is None else asyncio.Semaphore(most)
        self.outcomes: list[Outcome] = []

    async def run(self, began: float, begins: Sequence[float]) -> None:
        first = 0
        async with asyncio.TaskGroup() as group:
            for conversation, offset in zip(self._said, begins):
                due = began + offset
                await until(due)
                group.create_task(self._converse(first, conversation, due))
                first += len(conversation)

    async def _converse(self, first: int, conversation: Conversation, due: float) -> None:
        history: list[Exchange] = []
        earlier: Outcome | None = None
        async with self._limit:
            if not self._options.open_loop:
                due = time.perf_counter()
            for number, prompt in enumerate(conversation, first):
                outcome = Outcome(number, due, prompt.tokens, earlier)
                self.outcomes.append(outcome)
                self._tally.running += 1
                try:
                    await self._client.ask(outcome, prompt, history, self._tally.count)
                finally:
                    self._tally.running -= 1
                if outcome.failure is not None:
                    self._give_up(number, first + len(conversation), due)
                    return
                self._tally.completed += 1
                history.append((str(prompt.content), outcome.text))
                earlier = outcome
                due = time.perf_counter() + self._options.multi_turn_think_time_sec
                if number + 1 < first + len(conversation):
                    await until(due)

    def _give_up(self, failed: int, end: int, due: float) -> None:
        """What would have followed a turn that failed has failed with it: nothing of it can be said."""
        self._tally.failed += end - failed
        for number in range(failed + 1, end):
            skipped = Outcome(number, due, 0)
            skipped.failure = Failed("earlier_turn_failed", "an earlier turn of the conversation failed")
            self.outcomes.append(skipped)


async def until(due: float) -> None:
    """Sleeps to a moment, not past it: the event loop's timers go by whole milliseconds, so the rest of the last one is
    spent in turns of the loop."""
    while (left := due - time.perf_counter()) > 0:  # noqa: ASYNC110 - a moment is no event
        await asyncio.sleep(math.floor(min(left, HOUR) / MILLISECOND) * MILLISECOND)
