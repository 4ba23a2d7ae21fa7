"""A priority queue of items whose keys change while they are in it."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
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
        self._heap: list[tuple[Any, int, T]] = []
        self._valid: dict[T, int] = {}  # the number of each item's entry; others are out of date
        self._entries = 0

    def __len__(self) -> int:
        return len(self._valid)

    def __contains__(self, item: T) -> bool:
        return item in self._valid

    def put(self, item: T) -> None:
        self._entries += 1
        self._valid[item] = self._entries
        heappush(self._heap, (self._key(item), self._entries, item))
        if len(self._heap) > 2 * len(self._valid) + SMALL:
            self._heap = [entry for entry in self._heap if self._valid.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def drop(self, item: T) -> None:
        """Forgets `item`, if it is here."""
        self._valid.pop(item, None)

    def first(self) -> T | None:
        heap = self._heap
        while heap:
            key, number, item = heap[0]
            if self._valid.get(item) != number:
                heappop(heap)
            elif (present := self._key(item)) > key:
                heapreplace(heap, (present, number, item))
            else:
                return item
        return None
