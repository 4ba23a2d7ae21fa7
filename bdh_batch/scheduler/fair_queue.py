"""Who is next of those that wait: by priority class, inside it by fair shares of the keys, inside a key by arrival.

A key's account counts the work done for it, divided by its weight; the key with the least goes first. A key that comes
back from a pause starts where the others are: time in which it asked for nothing is not saved up.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

Line = tuple[int, str]  # who waits behind one another: a priority, and a key

GENERATED = 2.0  # what a generated token counts, where one of a prompt counts 1: it takes a step of its own


class Account:
    """What one key has used, in tokens over its weight, and how many of its sequences hold a state."""

    __slots__ = ("per_generated", "seats", "used", "weight")

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.used = 0.0
        self.seats = 0
        self.per_generated = GENERATED / weight


class FairQueue:
    """
    Args:
        weights: of keys; one that is not named weighs 1. Twice the weight is twice the share.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._accounts: dict[str, Account] = {}
        self._classes: dict[int, dict[str, list[Sequence]]] = {}  # by priority, by key; a list's last is its first
        self._tokens = 0
        self.lines: Counter[Line] = Counter()  # how many wait

    def __len__(self) -> int:
        return self.lines.total()

    def __iter__(self) -> Iterator[Sequence]:
        return (s for keys in self._classes.values() for line in keys.values() for s in reversed(line))

    @property
    def tokens(self) -> int:
        """Of the prompts that wait."""
        return self._tokens

    def account(self, key: str) -> Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(self._weights.get(key, 1.0))
        return account

    def push(self, sequence: Sequence) -> None:
        """Takes a new one, or back one that was taken out before its turn."""
        line = self._classes.setdefault(sequence.priority, {}).setdefault(sequence.key, [])
        if not line:
            self._catch_up(self.account(sequence.key))
        insort(line, sequence, key=lambda waiting: -waiting.place)
        self.lines[sequence.line] += 1
        self._tokens += len(sequence.prompt)

    def _catch_up(self, account: Account) -> None:
        """One that was idle starts where the one that has least is, or, alone, where the one that had most was."""
        if account.seats:
            return
        waiting = {id(self._accounts[key]) for keys in self._classes.values() for key, line in keys.items() if line}
        busy = [other.used for other in self._accounts.values() if other.seats or id(other) in waiting]
        account.used = max(account.used, min(busy) if busy else max(other.used for other in self._accounts.values()))

    def peek(self) -> Sequence | None:
        """The next one."""
        if not self._classes:
            return None
        keys = self._classes[min(self._classes)]
        return keys[min(keys, key=lambda key: (self._accounts[key].used, keys[key][-1].place))][-1]

    def newest(self) -> Sequence | None:
        """The last that came of the longest line of the last class."""
        if not self.lines:
            return None
        priority, key = max(self.lines, key=lambda line: (line[0], self.lines[line]))
        return self._classes[priority][key][0]

    def serve(self, sequence: Sequence) -> None:
        """Takes out `sequence`, whose turn it is, and charges its prompt to its key."""
        account = self.account(sequence.key)
        account.used += len(sequence.prompt) / account.weight
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        keys = self._classes[sequence.priority]
        line = keys[sequence.key]
        if line[-1] is sequence:
            line.pop()
        else:
            line.remove(sequence)
        if not line:
            del keys[sequence.key]
        if not keys:
            del self._classes[sequence.priority]
        self.lines[sequence.line] -= 1
        if not self.lines[sequence.line]:
            del self.lines[sequence.line]
        self._tokens -= len(sequence.prompt)
