"""Puts a stream's deltas together, for a client that wants several tokens an event."""

from __future__ import annotations

from collections.abc import Sequence

from bdh_batch.messages import Delta, Gathering

Deltas = Sequence[tuple[int, Delta]]


class Chunks:
    """A sequence's first token goes at once; later ones wait until they are `tokens`, or the response ends."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._waiting: dict[int, Gathering | None] = {}

    def take(self, deltas: Deltas) -> Deltas:
        """Those that go now, of `deltas` and of what waited."""
        if self._tokens == 1:
            return deltas
        return [ready for index, delta in deltas for ready in self._add(index, delta)]

    def _add(self, index: int, delta: Delta) -> Deltas:
        if index not in self._waiting:
            self._waiting[index] = None
            return [(index, delta)]
        waited = self._waiting[index] or Gathering()
        self._waiting[index] = None
        if delta.error is not None:
            return [(index, each) for each in (waited.whole(), delta) if each.tokens or each is delta]
        waited.add(delta)
        if waited.tokens < self._tokens and delta.finish_reason is None:
            self._waiting[index] = waited
            return []
        return [(index, waited.whole())]
