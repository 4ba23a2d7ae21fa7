"""Which states are kept of what was computed before, and which of them is worth least. Moves nothing itself.

An entry is found by its namespace, its length and a hash of all its tokens. All states have the same size, so what an
entry saves per byte is its tokens times how often it is used; entries age against what had to go (GreedyDual).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from itertools import count

from bdh_batch.scheduler.prefixes import TOKEN_BYTES

SMALL = 64  # entries that are not worth clearing out
TAIL = 8 * TOKEN_BYTES  # so many bytes at the end of a beginning tell almost always that it is another


@dataclass(slots=True, eq=False)
class Entry:
    namespace: str
    length: int  # tokens
    tail: bytes
    digest: bytes
    slot: int
    uses: int = 0
    awaited: int = 0  # sequences that wait to begin here
    worth: float = 0.0


Rank = tuple[float, int, Entry]


class PrefixCache:
    """
    Args:
        device: slots below it are on the device.
    """

    def __init__(self, device: int = 0) -> None:
        self._device = device
        self._entries: dict[tuple[str, int, bytes], Entry] = {}
        self._tails: dict[str, dict[int, Counter[bytes]]] = {}  # of the entries of each length
        self._ascending: dict[str, list[int]] = {}  # these lengths
        # By worth, on the host and on the device; what has changed since it was put there is passed over.
        self._ranked: tuple[list[Rank], list[Rank]] = ([], [])
        self._ranks = count()
        self._age = 0.0  # the worth of the last one that had to go

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, namespace: str, prompt: bytes, most: int) -> Entry | None:
        """The entry with the longest beginning of `prompt`, of at most `most` tokens."""
        ascending, tails = self._ascending.get(namespace, []), self._tails.get(namespace, {})
        lengths = ascending[: bisect_right(ascending, most)]
        lengths = [length for length in lengths if tail_of(prompt, length) in tails[length]]
        digests = digests_at(prompt, lengths)
        for length, digest in zip(reversed(lengths), reversed(digests)):
            if (entry := self._entries.get((namespace, length, digest))) is not None:
                return entry
        return None

    def get(self, namespace: str, prompt: bytes, length: int) -> Entry | None:
        (digest,) = digests_at(prompt, [length])
        return self._entries.get((namespace, length, digest))

    def holds(self, entry: Entry) -> bool:
        return self._entries.get((entry.namespace, entry.length, entry.digest)) is entry

    def worth(self, length: int, uses: int = 0) -> float:
        """What an entry would be worth now."""
        return self._age + length * (1 + uses)

    def add(self, namespace: str, prompt: bytes, length: int, slot: int) -> Entry:
        (digest,) = digests_at(prompt, [length])
        entry = Entry(namespace, length, tail_of(prompt, length), digest, slot, worth=self.worth(length))
        assert (namespace, length, digest) not in self._entries
        self._entries[namespace, length, digest] = entry
        tails = self._tails.setdefault(namespace, {})
        if length not in tails:
            tails[length] = Counter()
            insort(self._ascending.setdefault(namespace, []), length)
        tails[length][entry.tail] += 1
        self._rank(entry)
        return entry

    def use(self, entry: Entry) -> None:
        entry.uses += 1
        entry.worth = self.worth(entry.length, entry.uses)
        self._rank(entry)

    def move(self, entry: Entry, slot: int) -> None:
        """Its state lies in `slot` from now on."""
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
        """Forgets `entry`; its slot is the caller's again."""
        self._age = max(self._age, entry.worth)
        del self._entries[entry.namespace, entry.length, entry.digest]
        tails = self._tails[entry.namespace]
        alike = tails[entry.length]
        alike[entry.tail] -= 1
        if not alike[entry.tail]:
            del alike[entry.tail]
        if not alike:
            del tails[entry.length]
            self._ascending[entry.namespace].remove(entry.length)
        if not tails:
            del self._tails[entry.namespace], self._ascending[entry.namespace]

    def _rank(self, entry: Entry) -> None:
        ranked = self._ranked[entry.slot < self._device]
        heappush(ranked, (entry.worth, next(self._ranks), entry))
        if len(ranked) > 4 * len(self) + SMALL:  # mostly what has changed since
            ranked[:] = {id(rank[2]): rank for rank in ranked if self._is_current(rank, ranked)}.values()
            heapify(ranked)

    def _is_current(self, rank: Rank, ranked: list[Rank]) -> bool:
        worth, _, entry = rank
        return self.holds(entry) and entry.worth == worth and self._ranked[entry.slot < self._device] is ranked


def tail_of(prompt: bytes, length: int) -> bytes:
    end = length * TOKEN_BYTES
    return prompt[max(0, end - TAIL) : end]


def digests_at(prompt: bytes, lengths: Iterable[int]) -> list[bytes]:
    """Hashes of the first tokens of `prompt`, at ascending lengths, each byte read once."""
    running, done, digests = blake2b(digest_size=16), 0, []
    for length in lengths:
        running.update(prompt[done * TOKEN_BYTES : length * TOKEN_BYTES])
        done = length
        digests.append(running.copy().digest())
    return digests
