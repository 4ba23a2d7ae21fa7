"""Which copies of a plan are left to the kernels: those of states that its segments begin in.

Made before the forward pass, such a copy brings a state through the caches twice, the first time in one thread. The
kernels make it head by head, and then read it where it is.
"""

from __future__ import annotations

from collections.abc import Callable

from bdh_batch.messages import Copy, Plan


def begun_copies(plan: Plan, can_be_begun_in: Callable[[int], bool]) -> dict[int, Copy]:
    """The copies that can be made after all the others and after the releases, by their targets: slots of segments.

    Such a copy is whole, nothing after it in the plan reads or writes its target, and nothing writes its source.

    Args:
        can_be_begun_in: whether the kernels may copy the state in a slot.
    """
    if not plan.copies:  # as mostly
        return {}
    computed = {segment.slot for segment in plan.segments}
    cleared = {segment.slot for segment in plan.segments if segment.start == 0}
    begun: dict[int, Copy] = {}
    used, written = set[int](), {*computed, *plan.releases}  # by what comes later
    for copy in reversed(plan.copies):
        is_whole = copy.end - copy.begin == copy.parts and not copy.moves
        is_begun_in = copy.target in computed - cleared - used
        if is_whole and is_begun_in and copy.source not in written and can_be_begun_in(copy.source):
            begun[copy.target] = copy
        used |= {copy.source, copy.target}
        written |= {copy.source, copy.target} if copy.moves else {copy.target}  # a move exchanges memory
    return begun
