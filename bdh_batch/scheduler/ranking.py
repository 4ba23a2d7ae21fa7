"""A priority queue of items whose keys change while they are in it."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any, Generic, TypeVar

T = TypeVar("T")

SMALL = 64  # entries, which are not worth clearing out


class Ranking(Generic[T]):
    """Finds the item with the least key, in logarithmic time on average.

    A key that grows needs no notice: an entry that is out of date is put right when it comes first. An item whose key
    has become less has to be `put` again.
    """

    def __init__(self, key: Callable[[T], Any]) -> None:
        self._key = key
        self._heap: list[list[Any]] = []  # of keys, numbers, and items; None for one that is no longer here
        self._entries: dict[T, list[Any]] = {}  # in the heap
        self._numbers = count()  # of equal keys, the first to come goes first

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def put(self, item: T) -> None:
        self.drop(item)
        self._entries[item] = entry = [self._key(item), next(self._numbers), item]
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + SMALL:
            self._heap = [*self._entries.values()]
            heapify(self._heap)

    def drop(self, item: T) -> None:
        """Forgets `item`, if it is here."""
        if (entry := self._entries.pop(item, None)) is not None:
            entry[2] = None

    def first(self, most: Any = None) -> T | None:
        """The item with the least key; None where that is more than `most`."""
        heap = self._heap
        item: T | None
        while heap:
            entry = heap[0]
            key, _, item = entry
            if item is None:
                heappop(heap)
            elif most is not None and key > most:
                return None
            elif (present := self._key(item)) > key:
                entry[0] = present
                heapreplace(heap, entry)
            else:
                return item
        return None
