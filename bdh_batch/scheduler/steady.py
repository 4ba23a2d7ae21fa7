"""Remembers the segments of a step in which all that runs decodes. The next step has the same while nothing comes or
goes, as segments are kept up. Decides nothing."""

from __future__ import annotations

from itertools import count

from bdh_batch.messages import Segment
from bdh_batch.scheduler.groups import Groups
from bdh_batch.scheduler.sequence import Sequence

NUMBERS = count(1)  # of kept segments; those of several schedulers may be computed by one runner


class Steady:
    """The streams of steps that have one token of all that runs, and their segments."""

    def __init__(self) -> None:
        self._changes = -1
        self._streams: list[Sequence] = []
        self._segments: list[Segment] | None = None
        self._number = 0  # of those segments

    def streams(self, running: Groups) -> list[Sequence]:
        """All that is `running`: the same list, not to be changed, while nothing comes or goes."""
        if self._changes != running.changes:
            self._changes, self._streams, self._segments = running.changes, [*running], None
        return self._streams

    def segments(self, streams: list[Sequence], keep: bool) -> tuple[list[Segment], int]:
        """The segments of `streams`, not to be changed, and their number in `Plan.steady`. To be kept for the next step
        if that may have the same."""
        if self._segments is not None and streams is self._streams:
            return self._segments, self._number
        segments = [stream.decoding or stream.decode_segment() for stream in streams]
        kept = keep and streams is self._streams and all(stream.decoding is not None for stream in streams)
        self._segments, self._number = (segments, next(NUMBERS)) if kept else (None, 0)
        return segments, self._number
