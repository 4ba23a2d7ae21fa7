"""Holds the cached prefixes, and finds the one that is worth least. It moves no states itself.

All states have the same size, so what an entry saves per byte is its tokens times how often it is used; entries age
against what had to go (GreedyDual).
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count

from bdh_batch.scheduler.prefix_index import End, Entry, PrefixIndex, digests_at

__all__ = ["End", "Entry", "PrefixCache", "digests_at"]

SMALL = 64  # entries that are not worth clearing out

Rank = tuple[float, int, Entry]


class PrefixCache:
    """Holds cached prefixes by their tokens, ranked by their worth.

    Args:
        device: slots below it are on the device.
    """

    def __init__(self, device: int = 0) -> None:
        self._device = device
        self.on_device = 0  # entries whose states are there
        self._index = PrefixIndex()
        # By worth, on the host and on the device; what has changed since it was put there is passed over.
        self._ranked: tuple[list[Rank], list[Rank]] = ([], [])
        self._ranks = count()
        self._age = 0.0  # the worth of the last one that had to go

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._index)

    def find(self, namespace: str, prompt: bytes, most: int) -> Entry | None:
        """Returns the entry with the longest prefix of `prompt`, of at most `most` tokens."""
        return self._index.find(namespace, prompt, most)

    def get(self, namespace: str, prompt: bytes, length: int) -> Entry | None:
        return self._index.get(namespace, prompt, length)

    def holds(self, entry: Entry) -> bool:
        return self._index.holds(entry)

    def worth(self, length: int, uses: int = 0) -> float:
        """Returns what an entry would be worth now."""
        return self._age + length * (1 + uses)

    def twin(self, entry: Entry) -> Entry | None:
        """Returns the entry of the same prefix, if there is one."""
        return self._index.twin(entry)

    def add(self, entry: Entry, now: float = 0.0) -> None:
        """Caches the state in the slot of `entry`; `now` is in seconds."""
        entry.worth, entry.used = self.worth(entry.length), now
        self._index.add(entry)
        self.on_device += entry.slot < self._device
        self._rank(entry)

    def use(self, entry: Entry, now: float = 0.0) -> None:
        entry.uses += 1
        entry.worth, entry.used = self.worth(entry.length, entry.uses), now
        self._rank(entry)

    def demote(self, entry: Entry) -> None:
        """Lowers the worth of an entry to that of the last one evicted, until the entry is used."""
        entry.worth = self._age
        self._rank(entry)

    def move(self, entry: Entry, slot: int) -> None:
        """Records that the state of an entry was moved to `slot`."""
        self.on_device += (slot < self._device) - (entry.slot < self._device)
        entry.slot = slot
        self._rank(entry)

    def least(self, on_device: bool, spare: Entry | None = None) -> Entry | None:
        """The one there, but for `spare`, that is worth least; one that is awaited comes after all others."""
        ranked, aside, found = self._ranked[on_device], [], None
        while ranked and found is None:
            rank = heappop(ranked)
            if self._is_current(rank, ranked):
                aside.append(rank)
                entry = rank[2]
                if not entry.awaited and entry is not spare:
                    found = entry
        for rank in aside:
            heappush(ranked, rank)
        return found or next((entry for _, _, entry in aside if entry is not spare), None)

    def drop(self, entry: Entry) -> None:
        """Removes `entry`; its slot belongs to the caller."""
        self._age = max(self._age, entry.worth)
        self._index.remove(entry)
        self.on_device -= entry.slot < self._device

    def _rank(self, entry: Entry) -> None:
        ranked = self._ranked[entry.slot < self._device]
        heappush(ranked, (entry.worth, next(self._ranks), entry))
        if len(ranked) > 4 * len(self) + SMALL:  # mostly what has changed since
            ranked[:] = {id(rank[2]): rank for rank in ranked if self._is_current(rank, ranked)}.values()
            heapify(ranked)

    def _is_current(self, rank: Rank, ranked: list[Rank]) -> bool:
        worth, _, entry = rank
        return self.holds(entry) and entry.worth == worth and self._ranked[entry.slot < self._device] is ranked
