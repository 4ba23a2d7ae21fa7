"""Shows steps to those who ask: which sequences a step computes and with how many tokens, who waits, and why.

Sequences go by the ids of their requests and the labels of their tenants; no prompt, no text and no key is in a record.
While nobody asks, a step costs one comparison.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from heapq import nsmallest
from itertools import chain, islice

from bdh_batch.errors import Unavailable
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.rank import rank
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Sequence, Stage

Record = dict[str, object]

SHOWN = 64  # sequences of a step, and of those that wait
LOOKED_AT = 1024  # of those that wait, in the order of their ranks as far as they are this many
RECORDINGS = 4  # at a time
REASONS = {
    Stage.AWAITING_PREFIX: "prefix",
    Stage.AWAITING_STATE: "state_file",
    Stage.SWAPPED: "preempted",
}


class Recording:
    """Steps that somebody has asked for. Its last step, or `stop`, ends it; the event loop is told by `ended`."""

    def __init__(self, count: int) -> None:
        self.records: list[Record] = []
        self.ended = asyncio.Event()
        self.stopped = False
        self._count = count
        self._loop = asyncio.get_running_loop()

    def add(self, record: Record) -> None:
        self.records.append(record)
        if len(self.records) == self._count:
            self.stopped = True
            self._loop.call_soon_threadsafe(self.ended.set)


class StepRecordings:
    """Those who want to see the steps of one engine. `record` is for the event loop, the rest for the worker."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._wanted: list[Recording] = []

    async def record(self, count: int, seconds: float) -> list[Record]:
        """Returns the next `count` steps, or those within some seconds.

        Raises:
            Unavailable: too many look on.
        """
        self._wanted = [each for each in self._wanted if not each.stopped]
        if len(self._wanted) >= RECORDINGS:
            raise Unavailable("Too many look at the steps of this engine; try again.", retry_after=2)
        recording = Recording(count)
        self._wanted.append(recording)
        try:
            async with asyncio.timeout(seconds):
                await recording.ended.wait()
        except TimeoutError:
            pass  # as many as there were
        finally:
            recording.stopped = True  # one that comes may have dropped it already
            self._wanted = [each for each in self._wanted if each is not recording]
        return recording.records

    def begun(self, step: Step) -> Record | None:
        """Describes a step that is about to be computed; None where nobody looks."""
        return describe_step(step, self._scheduler) if self._wanted else None

    def ended(self, record: Record | None, seconds: float, error: Exception | None = None) -> None:
        """The step that `record` describes has been computed, or has failed with an error."""
        if record is None:
            return
        record |= {"seconds": round(seconds, 6), "error": None if error is None else type(error).__name__}
        for recording in [*self._wanted]:
            if not recording.stopped:
                recording.add(record)


def describe_step(step: Step, scheduler: Scheduler) -> Record:
    """Returns what a step computes, and who waits meanwhile and why."""
    members = set(step.sequences)
    shown = zip(step.sequences[:SHOWN], step.plan.segments, strict=False)
    idle = [sequence for sequence in scheduler.running if sequence not in members]
    waiting = [*chain(idle[:SHOWN], _first(scheduler))][:SHOWN]
    holding = len(scheduler.running) + len(scheduler.swapped)
    return {
        "step": scheduler.counts.steps,
        "planned": round(step.planned, 6),
        "decodes": step.decodes,
        "prompt_tokens": step.prefill_tokens,
        "copies": len(step.plan.copies),
        "slots": scheduler.size.width,
        "running": len(scheduler.running),
        "sequences": [
            _identity(sequence)
            | {
                "tokens": len(segment.tokens),
                "position": segment.start,
                "phase": "prompt" if segment.start < len(sequence.prompt) else "decode",
            }
            for sequence, segment in shown
        ],
        "waiting_total": len(scheduler.stages) - len(members),
        "waiting": [
            _identity(sequence)
            | {"reason": _reason(sequence, scheduler, holding), "seconds": _waited(sequence, step.planned)}
            for sequence in waiting
        ],
    }


def _first(scheduler: Scheduler) -> list[Sequence]:
    """Those without a slot, the first in rank first."""
    groups = [group for stage, group in scheduler.stages.groups.items() if stage is not Stage.RUNNING]
    some: Iterable[Sequence] = islice(chain.from_iterable(groups), LOOKED_AT)
    return nsmallest(SHOWN, some, key=rank)


def _identity(sequence: Sequence) -> Record:
    return {
        "request": sequence.id,
        "index": sequence.client.index,
        "tenant": sequence.tenant,
        "priority": sequence.priority,
        "prompt": len(sequence.prompt),
        "generated": len(sequence.generated),
    }


def _reason(sequence: Sequence, scheduler: Scheduler, holding: int) -> str:
    """Why it is not in the step, by a short name."""
    if sequence.stage is Stage.RUNNING:
        return "copy" if sequence.slot in scheduler.allocator.copies.busy else "step_full"
    if sequence.stage is Stage.QUEUED:
        return "max_running" if holding >= scheduler.max_running else "no_slot"
    return REASONS[sequence.stage]


def _waited(sequence: Sequence, now: float) -> float:
    """Seconds since something of it was computed; of one that has just come, since then."""
    return round(max(0.0, now - sequence.standing.served_at), 3)


def describe(step: Step | None) -> str:
    """A plan in short, for the log."""
    if step is None:
        return "nothing"
    return (
        f"{len(step.sequences)} sequences ({step.decodes} decoding), {step.prefill_tokens} prompt tokens "
        f"and {len(step.plan.copies)} copies, of requests {', '.join(sorted({s.id for s in step.sequences})[:8])}"
    )
