"""Finds stop strings in a text that comes in pieces, at a cost that depends on the piece alone.

An Aho-Corasick automaton (Aho and Corasick, CACM 1975), made once for a request and shared by its sequences, each of
which keeps no more than a state. pyahocorasick can search across pieces, too, but does not say how much of a text may
still become a match, which is what a stream has to hold back.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

START = 0  # the state before any text
NO_CODE = -1


class Found(NamedTuple):
    """The first stop string that is complete: where it ends in the piece, and how long it is."""

    end: int
    length: int


class StopStrings:
    """A state is a node of the trie of all stop strings: the longest end of the text that is a prefix of one.

    The nodes of one string are numbered consecutively, so that only where strings part an edge needs an entry: a node
    takes 16 bytes, and a request with many long stop strings no more than some hundred KiB.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._first = frozenset(string[0] for string in strings)
        self._codes = array("i", [NO_CODE])  # of the character that leads to a node from the one before it
        self._branches: dict[tuple[int, int], int] = {}  # the other edges, by node and character
        self._complete = array("i", [0])  # length of the longest stop string that ends at a node
        for string in strings:
            self._add(string)
        self._codes.append(NO_CODE)
        # Length of the longest end of a node's text that is a prefix of a stop string, and not all of it.
        self._unfinished = array("i", bytes(self._complete.itemsize * len(self._complete)))
        # Where to look on for a character that no edge of a node has: at the longest end of its text that is a node,
        # too, and has other edges. Without those other edges, a run of one character would be walked back step by step.
        self._fallback = array("i", self._unfinished)
        self._shorter = array("i", self._unfinished)  # the longest end of a node's text that is a node, too
        self._link()

    def __bool__(self) -> bool:
        return bool(self._first)

    def scan(self, state: int, text: str, ignored: int = 0) -> tuple[int, Found | None]:
        """The state after `text`, or after what completes a stop string: the first, and of those the longest. One that
        is complete within the first `ignored` characters is none.
        """
        if state == START and self._first.isdisjoint(text):
            return START, None
        complete = self._complete
        for end, code in enumerate(map(ord, text), 1):
            state = self._after(state, code)
            if complete[state] and end > ignored:
                return state, Found(end, complete[state])
        return state, None

    def unfinished(self, state: int) -> int:
        """How many characters at the end of the text may be a prefix of a stop string."""
        return self._unfinished[state]

    def _after(self, state: int, code: int) -> int:
        codes, branches = self._codes, self._branches
        while True:
            if codes[state + 1] == code:
                return state + 1
            if (after := branches.get((state, code))) is not None:
                return after
            if state == START:
                return START
            state = self._fallback[state]

    def _add(self, string: str) -> None:
        codes, branches, complete = self._codes, self._branches, self._complete
        node = START
        for code in map(ord, string):
            new = len(complete)
            if node + 1 < new and codes[node + 1] == code:
                node += 1
            elif (after := branches.get((node, code))) is not None:
                node = after
            else:
                if node + 1 < new:
                    branches[node, code] = new
                codes.append(code if node + 1 == new else NO_CODE)
                complete.append(0)
                node = new
        complete[node] = len(string)

    def _link(self) -> None:
        """By rising depth, as what a node looks at lies less deep."""
        codes, complete, unfinished, fallback = self._codes, self._complete, self._unfinished, self._fallback
        branches: dict[int, list[tuple[int, int]]] = {}
        for (node, code), child in self._branches.items():
            branches.setdefault(node, []).append((code, child))
        shorter = self._shorter
        level, depth = [START], 0
        while level:
            below: list[int] = []
            for node in level:
                end, code = shorter[node], codes[node + 1]
                children = branches.get(node, [])
                if code != NO_CODE:
                    children = [(code, node + 1), *children]
                complete[node] = complete[node] or complete[end]
                unfinished[node] = depth if children else unfinished[end]
                alike = node != START and end not in branches and codes[end + 1] in (code, NO_CODE)
                fallback[node] = fallback[end] if alike else end
                for code, child in children:
                    shorter[child] = START if node == START else self._after(end, code)
                    below.append(child)
            level, depth = below, depth + 1
