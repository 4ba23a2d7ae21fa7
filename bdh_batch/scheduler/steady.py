"""Remembers the segments of a step in which all that runs decodes. The next step is the same while nothing comes or
goes, as segments are kept up. Decides nothing."""

from __future__ import annotations

from bdh_batch.messages import Segment
from bdh_batch.scheduler.groups import Groups
from bdh_batch.scheduler.sequence import Sequence

Streams = tuple[list[Segment], list[Sequence]]


class Steady:
    """The segments and sequences of a step that has all that runs, and nothing else."""

    def __init__(self) -> None:
        self._changes = -1  # of what runs, when they were listed
        self._streams: Streams | None = None

    def forget(self) -> None:
        """Another step was planned: a sequence may begin to decode without coming or going."""
        self._changes, self._streams = -1, None

    def streams(self, running: Groups) -> Streams | None:
        """Those of what is `running`; None where a sequence does not decode."""
        if self._changes != running.changes:
            sequences = [*running]
            segments = [sequence.decoding for sequence in sequences if sequence.decoding is not None]
            self._streams = (segments, sequences) if len(segments) == len(sequences) else None
            self._changes = running.changes if self._streams else -1
        return self._streams
