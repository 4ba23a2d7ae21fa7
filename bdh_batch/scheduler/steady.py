"""Remembers the segments of a step in which all that runs decodes. The next step has the same while nothing comes or
goes, as segments are kept up. Decides nothing."""

from __future__ import annotations

from bdh_batch.messages import Segment
from bdh_batch.scheduler.sequence import Sequence


class Steady:
    """The segments of the streams of a step."""

    def __init__(self) -> None:
        self._changes: int | None = None
        self._segments: list[Segment] = []

    def segments(self, streams: list[Sequence], changes: int | None) -> list[Segment]:
        """Those of `streams`, not to be changed.

        Args:
            changes: how often a sequence came to run, or ceased to, where `streams` are all that run; None where they
                are not, or where a sequence may become another segment's without coming or going.
        """
        if changes is None or changes != self._changes:
            self._segments = [stream.decoding or stream.decode_segment() for stream in streams]
            kept = changes is not None and all(stream.decoding is not None for stream in streams)
            self._changes = changes if kept else None
        return self._segments
