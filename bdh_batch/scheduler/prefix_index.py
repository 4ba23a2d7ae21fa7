"""Finds the longest of many token prefixes that a prompt begins with. Knows nothing about who caches what, and why.

An entry is found by its namespace, its length and a hash of all its tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b

from bdh_batch.scheduler.prefixes import TOKEN_BYTES

TAIL = 8 * TOKEN_BYTES  # so many bytes at the end of a prefix almost always distinguish it from another

Key = tuple[str, int, bytes]


class End(Enum):
    """What of a request ended where a state was taken; the next turn of a conversation mostly begins at one of them."""

    PROMPT = "prompt"
    COMPLETION = "completion"


@dataclass(slots=True, eq=False)
class Entry:
    """A cached prefix, with the counts and times of its use."""

    namespace: str
    length: int  # tokens
    tail: bytes
    digest: bytes
    slot: int
    uses: int = 0
    used: float = 0.0  # seconds: when it was added, or last used
    awaited: int = 0  # sequences that wait to begin here
    worth: float = 0.0
    end: End | None = None
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.namespace, self.length, self.digest

    @classmethod
    def of(cls, namespace: str, prompt: bytes, length: int, slot: int, end: End | None = None) -> Entry:
        return cls(namespace, length, tail_of(prompt, length), digest_of(prompt, length), slot, end=end)


class PrefixIndex:
    """An index of entries by their tokens, in the order in which they were added, each prefix once."""

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}
        self._tails: dict[str, dict[int, dict[bytes, int]]] = {}  # of the entries of each length, and how many have it
        self._ascending: dict[str, list[int]] = {}  # these lengths

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, namespace: str, prompt: bytes, most: int, above: int = 0) -> Entry | None:
        """Returns the entry with the longest prefix of `prompt`, of more than `above` and at most `most` tokens."""
        ascending, tails = self._ascending.get(namespace, []), self._tails.get(namespace, {})
        lengths = ascending[bisect_right(ascending, above) : bisect_right(ascending, most)]
        # As tail_of, which is dear to call for each of hundreds of lengths.
        lengths = [at for at in lengths if prompt[max(0, at * TOKEN_BYTES - TAIL) : at * TOKEN_BYTES] in tails[at]]
        digests = digests_at(prompt, lengths) if lengths else []
        for length, digest in zip(reversed(lengths), reversed(digests)):
            if (entry := self._entries.get((namespace, length, digest))) is not None:
                return entry
        return None

    def get(self, namespace: str, prompt: bytes, length: int) -> Entry | None:
        return self._entries.get((namespace, length, digest_of(prompt, length)))

    def twin(self, entry: Entry) -> Entry | None:
        """Returns the entry of the same prefix, if there is one."""
        return self._entries.get(entry.key)

    def holds(self, entry: Entry) -> bool:
        return self._entries.get(entry.key) is entry

    def add(self, entry: Entry) -> None:
        assert entry.key not in self._entries
        self._entries[entry.key] = entry
        tails = self._tails.setdefault(entry.namespace, {})
        if entry.length not in tails:
            tails[entry.length] = {}
            insort(self._ascending.setdefault(entry.namespace, []), entry.length)
        alike = tails[entry.length]
        alike[entry.tail] = alike.get(entry.tail, 0) + 1

    def remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        tails = self._tails[entry.namespace]
        alike = tails[entry.length]
        alike[entry.tail] -= 1
        if not alike[entry.tail]:
            del alike[entry.tail]
        if not alike:
            del tails[entry.length]
            ascending = self._ascending[entry.namespace]
            del ascending[bisect_left(ascending, entry.length)]
        if not tails:
            del self._tails[entry.namespace], self._ascending[entry.namespace]


def tail_of(prompt: bytes, length: int) -> bytes:
    end = length * TOKEN_BYTES
    return prompt[max(0, end - TAIL) : end]


def digest_of(prompt: bytes, length: int) -> bytes:
    """Returns the hash of the first `length` tokens of `prompt`."""
    return blake2b(prompt[: length * TOKEN_BYTES], digest_size=16).digest()


def digests_at(prompt: bytes, lengths: Iterable[int]) -> list[bytes]:
    """Yields hashes of the first tokens of `prompt`, at ascending lengths, reading each byte once."""
    running, done, digests = blake2b(digest_size=16), 0, []
    for length in lengths:
        running.update(prompt[done * TOKEN_BYTES : length * TOKEN_BYTES])
        done = length
        digests.append(running.copy().digest())
    return digests
