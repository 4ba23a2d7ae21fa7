"""The operator's settings of the scheduler, the guards of the rank, and the counts of decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from bdh_batch.scheduler.backlog import NO_UNIT
from bdh_batch.scheduler.copies import WHOLE, CopyLimits


@dataclass(frozen=True, slots=True)
class Guards:
    """Bounds what the rank alone would do. `docs/scheduling.md` says which figure fails without each of them."""

    awaits: float = 0.4  # of what a step took, for which the next waits for a tenant that would go first
    alternate: bool = True  # streams that a step with prompts left out go first in the next
    finished: float = 2.0  # times a step's time, for a prompt that goes before streams and is finished by it
    least_share: float = 0.25  # of the time of a step without prompts, that prompts get after the streams before them
    least_width: int = 64  # streams in any step, if no prompt goes before them
    little: float = 0.1  # of a step's time: where a step costs more by itself, no stream is left out
    exchanges: bool = True  # no more are preempted in a plan than keeps every time slice whole
    again: bool = True  # who loses its state has got further with it than the other one has to compute again
    later_apart: bool = True  # swapped sequences of a later priority do not count against `max_running`


@dataclass(frozen=True, slots=True)
class Policy:
    """Holds what the settings choose about scheduling.

    Args:
        host_slots: slots for states in the host's memory.
        swaps: whether sequences may lie there; else only cached prefixes do.
        transfer_slots: slots for states on their way from and to files.
        copies: how much of states is copied in a step before what needs more has to wait.
        max_running: most sequences that hold a state; above `slots` they take time slices. None is as many as slots.
        time_slice: steps that a sequence runs while others wait for a slot.
        target_step: seconds that a step with streams should take; 0 is no limit.
        cache_prefixes: whether prefixes are cached for later requests.
        share_all: whether requests of all API keys share cached prefixes; else only those of one.
        min_shared: tokens that a prefix must have to be shared.
        weights: of tenants, in their share; one that is not named weighs 1.
        free_slots: slots whose memory may be touched before anything has shown that it is of use; None is all.
        idle_release: seconds after which the memory of idle slots goes back to the system; 0 is never.
        idle_kept: so many free slots, of each kind, keep their memory: nobody who comes after a pause waits for pages.
        patience: seconds without a computed token after which a sequence competes in the first priority.
        most_watched: tokens in a step whose neurons are shown.
        queue_unit: tokens of a prompt that fill the queue as another sequence does.
        guards: no option: it is there to be measured without them.
    """

    host_slots: int = 0
    swaps: bool = True
    transfer_slots: int = 0
    copies: CopyLimits = WHOLE
    max_running: int | None = None
    time_slice: int = 64
    target_step: float = 0.0
    cache_prefixes: bool = False
    share_all: bool = False
    min_shared: int = 32
    weights: Mapping[str, float] = field(default_factory=dict)
    free_slots: int | None = None
    idle_release: float = 0.0
    idle_kept: int = 0
    patience: float = inf
    most_watched: int = 2**62
    queue_unit: int = NO_UNIT
    guards: Guards = Guards()


@dataclass(slots=True)
class Counts:
    """Counts of the scheduler's decisions since the start."""

    steps: int = 0
    preemptions: int = 0
    served: int = 0  # times that a queued sequence was given a slot
