"""Compiled grammars, kept by their bytes, and what is wrong with those that are none."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llguidance import LLMatcher

LEAST_WEIGHT = 4 * 2**20  # bytes that a grammar counts for: it learns while it is used
MOST_PROBLEMS = 256
PROBLEM_SECONDS = 60.0  # that one is known: a busy machine may have been the reason


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a source, in the field `param`; None is the whole of it."""

    text: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar, and what was left out of its schemas (`lark.Written`).

    Args:
        matcher: at its start; None where it is compiled elsewhere.
        size: bytes that it takes.
    """

    matcher: LLMatcher | None
    text: str
    size: int
    warnings: Sequence[Mapping[str, str]] = ()


class GrammarCache:
    """Keeps those that were used last.

    Args:
        most_bytes: that all of them may take together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._compiled: OrderedDict[bytes, tuple[Compiled, int]] = OrderedDict()
        self._problems: OrderedDict[bytes, tuple[Problem, float]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._compiled)

    def get(self, key: bytes) -> Compiled | Problem | None:
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key][0]
        problem, until = self._problems.get(key, (None, 0.0))
        return problem if time.monotonic() < until else None

    def add(self, key: bytes, compiled: Compiled) -> list[LLMatcher]:
        """Keeps `compiled`, and returns the matchers that gave way."""
        gone = self._without(key)
        weight = max(compiled.size, LEAST_WEIGHT)
        self._compiled[key] = compiled, weight
        self.bytes += weight
        while self.bytes > self._most_bytes:
            gone += self._without(next(iter(self._compiled)))
        return gone

    def discard(self, key: bytes) -> None:
        self._without(key)

    def add_problem(self, key: bytes, problem: Problem) -> Problem:
        self._problems[key] = problem, time.monotonic() + PROBLEM_SECONDS
        self._problems.move_to_end(key)
        if len(self._problems) > MOST_PROBLEMS:
            self._problems.popitem(last=False)
        return problem

    def _without(self, key: bytes) -> list[LLMatcher]:
        compiled, weight = self._compiled.pop(key, (None, 0))
        self.bytes -= weight
        return [] if compiled is None or compiled.matcher is None else [compiled.matcher]
