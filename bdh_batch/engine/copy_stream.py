"""Copies of states beside the step that a GPU computes, where the step does not touch them: on a stream of their own.

A state of 100 MB takes 2 ms on its way to the host, as long as ten decode steps of one sequence. Knows slots, and no
tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch


class Stream(Protocol):
    """A stream of work on a device, as CUDA has them."""

    def record_event(self) -> Any:
        """Returns an event that is complete when all work that is in the stream now is."""

    def wait_event(self, event: Any) -> None:
        """Work that is launched in the stream from now on waits until the event is complete."""


class Streams(Protocol):
    """A stream for steps, and one for copies."""

    @property
    def steps(self) -> Stream: ...

    @property
    def copies(self) -> Stream: ...

    def for_copies(self) -> AbstractContextManager[Any]:
        """What is launched within goes to the stream for copies; else to that for steps."""


class CudaStreams:
    """Those of a GPU: its current stream, and one more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def steps(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def for_copies(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.copies)


class CopyStream:
    """Says on which stream each copy is made, and has steps and copies of the same slots wait for each other."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._used: Collection[int] = ()
        self._under_way: dict[int, Any] = {}  # by slot, its last copy that no step has waited for

    def begin(self, used: Iterable[int]) -> None:
        """A step begins, whose segments read and write the states in those slots. Its copies come next."""
        self._used = set(used)
        self._wait_for(self._used)

    @contextmanager
    def copying(self, source: int, target: int) -> Iterator[None]:
        """Within it, a copy between these slots is launched."""
        if source in self._used or target in self._used:
            self._wait_for((source, target))
            yield
            return
        steps, copies = self._streams.steps, self._streams.copies
        copies.wait_event(steps.record_event())
        try:
            with self._streams.for_copies():
                yield
        finally:  # of a copy that fails, a part may have been launched
            self._under_way[source] = self._under_way[target] = copies.record_event()

    def all_begun(self) -> Any:
        """Returns an event that is complete when all copies that were begun are made."""
        steps, copies = self._streams.steps, self._streams.copies
        copies.wait_event(steps.record_event())
        return copies.record_event()

    def _wait_for(self, slots: Collection[int]) -> None:
        for slot in slots:
            if (event := self._under_way.pop(slot, None)) is not None:
                self._streams.steps.wait_event(event)
