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

from bdh_batch.scheduler.prefixes import TOKEN_BYTES


@dataclass(slots=True, eq=False)
class Entry:
    namespace: str
    length: int  # tokens
    digest: bytes
    slot: int
    uses: int = 0
    awaited: int = 0  # sequences that wait to begin here
    worth: float = 0.0


class PrefixCache:
    def __init__(self) -> None:
        self._entries: dict[tuple[str, int, bytes], Entry] = {}
        self._lengths: dict[str, Counter[int]] = {}
        self._ascending: dict[str, list[int]] = {}
        self._age = 0.0  # the worth of the last one that had to go

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, namespace: str, prompt: bytes, most: int) -> Entry | None:
        """The entry with the longest beginning of `prompt`, of at most `most` tokens."""
        lengths = self._ascending.get(namespace, [])
        lengths = lengths[: bisect_right(lengths, most)]
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
        entry = Entry(namespace, length, digest, slot, worth=self.worth(length))
        assert (namespace, length, digest) not in self._entries
        self._entries[namespace, length, digest] = entry
        lengths = self._lengths.setdefault(namespace, Counter())
        lengths[length] += 1
        if lengths[length] == 1:
            insort(self._ascending.setdefault(namespace, []), length)
        return entry

    def use(self, entry: Entry) -> None:
        entry.uses += 1
        entry.worth = self.worth(entry.length, entry.uses)

    def least(self, entries: Iterable[Entry]) -> Entry | None:
        """The one that is worth least; one that is awaited comes after all others."""
        return min(entries, key=lambda entry: (entry.awaited > 0, entry.worth), default=None)

    def drop(self, entry: Entry) -> None:
        """Forgets `entry`; its slot is the caller's again."""
        self._age = max(self._age, entry.worth)
        del self._entries[entry.namespace, entry.length, entry.digest]
        lengths = self._lengths[entry.namespace]
        lengths[entry.length] -= 1
        if not lengths[entry.length]:
            del lengths[entry.length]
            self._ascending[entry.namespace].remove(entry.length)
        if not lengths:
            del self._lengths[entry.namespace], self._ascending[entry.namespace]


def digests_at(prompt: bytes, lengths: Iterable[int]) -> list[bytes]:
    """Hashes of the first tokens of `prompt`, at ascending lengths, each byte read once."""
    running, done, digests = blake2b(digest_size=16), 0, []
    for length in lengths:
        running.update(prompt[done * TOKEN_BYTES : length * TOKEN_BYTES])
        done = length
        digests.append(running.copy().digest())
    return digests
