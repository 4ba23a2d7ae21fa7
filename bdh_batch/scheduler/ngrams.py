"""Finds where the last tokens of a sequence were before, and what came after them there.

A table has, for each run of `least` tokens by its hash, the position behind its last occurrence. A match is followed
for as long as it goes on, so it may become longer than that. Each token takes the same time, and memory is bounded.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

MOST_SLOTS = 2**16  # of a table; later occurrences take the slots of earlier ones
CAUGHT_UP = 32  # tokens that are added at a time: a long prompt's take several steps


class Ngrams:
    """The tokens of one sequence, and where they repeat.

    Args:
        least: tokens of a match.
        most: tokens that the sequence may have.
    """

    __slots__ = ("_least", "_mask", "_source", "_table", "_tokens", "matched")

    def __init__(self, least: int, most: int) -> None:
        slots = min(1 << (2 * most).bit_length(), MOST_SLOTS)
        self.matched = 0  # of the last tokens, how many were there before; 0 or at least `least`
        self._least = least
        self._mask = slots - 1
        self._table = array("i", bytes(4 * slots))  # positions; 0 is none
        self._tokens = array("q")
        self._source = 0  # the position behind the match

    def follow(self, prompt: Sequence[int], generated: Sequence[int]) -> bool:
        """Adds the tokens that are new; returns whether these were all, and the last ones were there before."""
        begin = len(self._tokens)
        for at in range(begin, min(begin + CAUGHT_UP, len(prompt) + len(generated))):
            self._add(prompt[at] if at < len(prompt) else generated[at - len(prompt)])
        return self.matched > 0 and len(self._tokens) == len(prompt) + len(generated)

    def draft(self, count: int) -> list[int]:
        """The `count` tokens that came after the match; one that reaches up to the end repeats itself."""
        source, period = self._source, len(self._tokens) - self._source
        return [self._tokens[source + at % period] for at in range(count)]

    def _add(self, token: int) -> None:
        tokens, source = self._tokens, self._source
        if self.matched and tokens[source] == token:
            self._source, self.matched = source + 1, self.matched + 1
        else:
            self.matched = 0
        tokens.append(token)
        end = len(tokens)
        if end < self._least:
            return
        last = tokens[end - self._least :]
        slot = hash(tuple(last)) & self._mask
        found, self._table[slot] = self._table[slot], end
        if not self.matched and found and tokens[found - self._least : found] == last:
            self._source, self.matched = found, self._least
