"""Holds the cached prefixes, and finds the one that is worth least. It moves no states itself.

All states have the same size, so what an entry saves per byte is its tokens times how often it is used; entries age
against what had to go (GreedyDual).
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from bdh_batch.scheduler.prefix_index import End, Entry, PrefixIndex, digests_at
from bdh_batch.scheduler.ranking import Ranking

__all__ = ["End", "Entry", "PrefixCache", "digests_at"]

WORTH = attrgetter("worth")


class PrefixCache:
    """Holds cached prefixes by their tokens, ranked by their worth.

    Args:
        device: slots below it are on the device.
    """

    def __init__(self, device: int = 0) -> None:
        self._device = device
        self._index = PrefixIndex()
        # By worth, on the host and on the device.
        self._ranked: tuple[Ranking[Entry], ...] = (Ranking(WORTH), Ranking(WORTH))
        self._age = 0.0  # the worth of the last one that had to go

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._index)

    @property
    def on_device(self) -> int:
        """How many entries have their states there."""
        return len(self._ranked[True])

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
        self._ranking_of(entry).put(entry)

    def use(self, entry: Entry, now: float = 0.0) -> None:
        entry.uses += 1
        entry.worth, entry.used = self.worth(entry.length, entry.uses), now
        self._ranking_of(entry).put(entry)  # behind those that are worth the same

    def demote(self, entry: Entry) -> None:
        """Lowers the worth of an entry to that of the last one evicted, until the entry is used."""
        entry.worth = self._age
        self._ranking_of(entry).put(entry)

    def move(self, entry: Entry, slot: int) -> None:
        """Records that the state of an entry was moved to `slot`."""
        self._ranking_of(entry).drop(entry)
        entry.slot = slot
        self._ranking_of(entry).put(entry)

    def least(self, on_device: bool, spare: Entry | None = None) -> Entry | None:
        """The one there, but for `spare`, that is worth least; one that is awaited comes after all others."""
        ranking, aside = self._ranked[on_device], []
        while (entry := ranking.first()) is not None and (entry.awaited or entry is spare):
            ranking.drop(entry)
            aside.append(entry)
        for each in aside:
            ranking.put(each)
        return entry or next((each for each in aside if each is not spare), None)

    def drop(self, entry: Entry) -> None:
        """Removes `entry`; its slot belongs to the caller."""
        self._age = max(self._age, entry.worth)
        self._index.remove(entry)
        self._ranking_of(entry).drop(entry)

    def _ranking_of(self, entry: Entry) -> Ranking[Entry]:
        return self._ranked[entry.slot < self._device]
