"""Decides how much of the memory for states may be used: the rule by which new memory is touched. Pure.

A page of memory costs more to touch for the first time than what most requests compute, and stays with the process
afterwards. So a slot whose memory holds nothing yet is used

1. while fewer slots are touched than the working set has, which begins with `free_slots`;
2. for a sequence, or for a state that sequences wait for, where nothing cached could be evicted instead.

In all other cases the least useful cached prefix is evicted. The working set grows each time that a request asks for a
prefix that had to go for it, by what one request leaves: more memory would have served it. It shrinks by one for each
slot that has been idle.
"""

from __future__ import annotations

from bdh_batch.scheduler.prefix_index import Entry, PrefixIndex

FILLED = 64  # sequences, which on a CPU fill the time of a step: more of them take time slices
RUNNING_SHARE = 3 / 8  # of the slots; so much is for sequences, where the settings do not say how many may run
FREE_SHARE, CACHED_SHARE = 1 / 2, 1 / 8  # of the slots; at least the second is left for cached prefixes
STEP = 2  # slots: what a request leaves is mostly the state where its prompt ends, and that where its completion does


def running_slots(slots: int) -> int:
    """How many of `slots` sequences should use, where memory is taken only as it is touched: it is kept for prefixes
    that others ask for again, as more sequences would have no more tokens."""
    return min(slots, max(FILLED, int(RUNNING_SHARE * slots)))


def free_slots(slots: int, running: int) -> int:
    """How many of `slots` may be touched before anything has shown that more are of use."""
    return min(slots, max(int(FREE_SHARE * slots), running + int(CACHED_SHARE * slots)))


class WorkingSet:
    """Says how many slots may be touched, from the prefixes that had to be evicted.

    Args:
        slots: those on the device.
        free: those that may be touched without evidence; None is all of them, where the memory is taken anyway.
    """

    def __init__(self, slots: int, free: int | None = None) -> None:
        self._slots = slots
        self.free = slots if free is None else min(slots, free)
        self.size = self.free
        self._evicted = PrefixIndex()  # as many as could be cached if the working set were all slots

    def may_grow(self, touched: int) -> bool:
        """Whether one more slot than `touched` may be, although something could be evicted."""
        return touched < self.size

    def evicted(self, entry: Entry) -> None:
        """Records that the state of `entry` was evicted for want of memory."""
        if (twin := self._evicted.twin(entry)) is not None:
            self._evicted.remove(twin)
        self._evicted.add(entry)
        if len(self._evicted) > self._slots:
            self._evicted.remove(next(iter(self._evicted)))

    def asked(self, namespace: str, prompt: bytes, most: int, found: int) -> Entry | None:
        """A prompt was looked up to its first `most` tokens, and the first `found` of them were cached. Gives the entry
        that had more of them, and had to go."""
        entry = self._evicted.find(namespace, prompt, most, above=found)
        if entry is not None:
            self._evicted.remove(entry)
            self.size = min(self._slots, self.size + STEP)
        return entry

    def shrink(self) -> None:
        """Shrinks the working set, as a slot has been idle."""
        self.size = max(self.free, self.size - 1)
