"""One load in process, by continuous and by static batching on the same kernels; each gives the tokens of its
completions.

`continuous` is the server's Scheduler and Worker. The static ones fill a batch, run it until all of it have ended, and
fill the next: `padded` computes every row until then, as a rectangular batch does; else rows that ended are left out.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry

from bdh_batch.engine.completion import Completion
from bdh_batch.engine.worker import Worker
from bdh_batch.messages import Delta, Outcome, Plan, SamplingParams, Segment
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Sequence
from benchmarks.engine.play import Silent

LEAST, MOST = 8, 512  # tokens of a completion


class Runs(Protocol):
    def run(self, plan: Plan) -> Outcome: ...


@dataclass(frozen=True)
class Job:
    prompt: Many[int]
    length: int  # tokens of the completion
    seed: int

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=0.8, seed=self.seed)


def heavy_tailed(count: int, median: float, spread: float, seed: int) -> list[int]:
    """Lengths of completions, lognormal, between LEAST and MOST."""
    draw = random.Random(seed)
    return [min(MOST, max(LEAST, round(median * draw.lognormvariate(0.0, spread)))) for _ in range(count)]


def ideal(lengths: Many[int], batch: int) -> float:
    """How many times the rows that have to be computed a padded static batch computes."""
    longest = (max(lengths[start : start + batch]) for start in range(0, len(lengths), batch))
    return batch * sum(longest) / sum(lengths)


def static(runner: Runs, jobs: Many[Job], batch: int, prefill_tokens: int, padded: bool) -> list[list[int]]:
    completions = []
    for start in range(0, len(jobs), batch):
        completions += one_batch(runner, jobs[start : start + batch], prefill_tokens, padded)
    return completions


def one_batch(runner: Runs, jobs: Many[Job], prefill_tokens: int, padded: bool) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in jobs]
    for slots in prompts_of_a_step(jobs, prefill_tokens):
        take(runner, completions, slots, [Segment(slot, 0, jobs[slot].prompt, jobs[slot].sampling) for slot in slots])
    longest = max(job.length for job in jobs)
    for done in range(1, longest):
        slots = [slot for slot, job in enumerate(jobs) if padded or done < job.length]
        at = [len(jobs[slot].prompt) + done - 1 for slot in slots]
        segments = [
            Segment(slot, start, completions[slot][-1:], jobs[slot].sampling)
            for slot, start in zip(slots, at, strict=True)
        ]
        take(runner, completions, slots, segments)
    return [completion[: job.length] for completion, job in zip(completions, jobs, strict=True)]


def prompts_of_a_step(jobs: Many[Job], prefill_tokens: int) -> Iterator[list[int]]:
    """Whole prompts, as many as fit; one that does not fit goes alone."""
    slots: list[int] = []
    for slot, job in enumerate(jobs):
        if slots and sum(len(jobs[other].prompt) for other in slots) + len(job.prompt) > prefill_tokens:
            yield slots
            slots = []
        slots.append(slot)
    yield slots


def take(runner: Runs, completions: list[list[int]], slots: list[int], segments: list[Segment]) -> None:
    for slot, token in zip(slots, runner.run(Plan(segments)).drawn, strict=True):
        assert token is not None
        completions[slot].append(token)


async def continuous(runner: Runs, jobs: Many[Job], batch: int, prefill_tokens: int) -> list[list[int]]:
    ended = Ended(len(jobs))
    policy = Policy(target_step=0.1)
    worker = Worker(
        Scheduler(batch, prefill_tokens, policy), runner, EngineMetrics(CollectorRegistry(), "benchmark"), len(jobs)
    )
    try:
        worker.submit([sequence(job, index, ended) for index, job in enumerate(jobs)])
        await ended.all
    finally:
        worker.close()
    return ended.completions


def sequence(job: Job, index: int, ended: Ended) -> Sequence:
    return Sequence("", Completion(job.prompt, job.length, job.sampling, Silent()), Client(ended, index))


class Ended:
    """The mailbox of all completions; `all` is done when they are."""

    def __init__(self, count: int) -> None:
        self.completions: list[list[int]] = [[] for _ in range(count)]
        self.all: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open = count

    def put(self, index: int, delta: Delta) -> None:
        self.completions[index] += delta.tokens
        if delta.finish_reason is not None:
            self._open -= 1
            if not self._open:
                self.all.set_result(None)
