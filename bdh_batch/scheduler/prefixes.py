"""Packs prompts as bytes, and finds where they differ. Knows nothing about states."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable

TOKEN_BYTES = array("i").itemsize
SHORT = 128  # bytes, which are quicker compared as one number
RECENT = 512  # prompts that are remembered, of all namespaces together
RECENT_BYTES = 32 * 2**20


def pack(tokens: Iterable[int]) -> bytes:
    """Returns tokens as 32-bit integers, signed for the sake of latent steps."""
    # A list: bytes would be taken for an array's memory.
    return array("i", tokens if isinstance(tokens, list) else list(tokens)).tobytes()


def common(one: bytes, other: bytes) -> int:
    """Returns the length in tokens of the common prefix of two packed prompts."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high // TOKEN_BYTES
    size = 256  # prompts that part mostly part soon
    while size < high and one[low:size] == other[low:size]:
        low, size = size, size * 2
    high = min(high, size)
    while high - low > SHORT:  # they agree up to low, and differ before high
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    differing = int.from_bytes(one[low:high], "little") ^ int.from_bytes(other[low:high], "little")
    first = (differing & -differing).bit_length() - 1
    return (low + first // 8) // TOKEN_BYTES


class RecentPrompts:
    """A bounded, sorted record of prompts, in which the one with the longest common prefix is a neighbour."""

    def __init__(self) -> None:
        self._sorted: dict[str, list[bytes]] = {}
        self._order: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._bytes = 0

    def parting(self, namespace: str, prompt: bytes) -> int:
        """Records `prompt`, and returns how many tokens it has in common with the recorded prompt most like it."""
        prompts = self._sorted.setdefault(namespace, [])
        at = bisect_left(prompts, prompt)
        longest = 0
        for other in prompts[max(0, at - 1) : at + 1]:
            if other.startswith(prompt[: TOKEN_BYTES * (longest + 1)]):  # else it has no more of it in common
                longest = common(prompt, other)
        if (namespace, prompt) in self._order:
            self._order.move_to_end((namespace, prompt))
        else:
            prompts.insert(at, prompt)
            self._order[namespace, prompt] = None
            self._bytes += len(prompt)
            while len(self._order) > RECENT or self._bytes > RECENT_BYTES:
                self._forget()
        return longest

    def _forget(self) -> None:
        (namespace, prompt), _ = self._order.popitem(last=False)
        prompts = self._sorted[namespace]
        del prompts[bisect_left(prompts, prompt)]
        if not prompts:
            del self._sorted[namespace]
        self._bytes -= len(prompt)
