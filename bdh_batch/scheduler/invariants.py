"""What holds of a scheduler between two steps, whatever came before. It decides nothing."""

from __future__ import annotations

from itertools import chain

from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import WAITING


def check_invariants(scheduler: Scheduler) -> None:
    """Raises AssertionError where an invariant does not hold."""
    running, swapped = scheduler.running, scheduler.swapped
    assert all(s.decodes for s in running if s.decoding), "what is known to decode does"
    prompts = {sequence for sequence in running if not sequence.decodes}
    assert {s for s in scheduler.stages.prompts if not s.decodes} == prompts, "prompts that run are known"
    left = sum(max(0, len(s.prompt) - s.computed) for s in (*running, *swapped))
    assert scheduler.stages.prompt_tokens == left, "tokens of prompts are counted, also of those swapped"
    assert scheduler.stages.watching == sum(s.watches for s in running), "watched sequences are counted"
    assert len(running) <= scheduler.size.width, "no more run than may"
    waiting = [*chain.from_iterable(scheduler.stages.groups[stage] for stage in WAITING)]
    assert all(s.slot is None for s in waiting), "what waits holds no slot"
    assert all(s.finish_reason is None and s.pending >= 1 for s in (*running, *swapped)), "what runs has work"
    for stage, group in scheduler.stages.groups.items():
        assert all(sequence.stage is stage for sequence in group), "stages are right"
    assert len(scheduler.stages.backlog) == len(waiting), "what waits is counted"
    scheduler.allocator.check([*running], [*swapped])
    scheduler.sharing.check()
