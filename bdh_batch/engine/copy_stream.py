"""Copies of states beside the step that a GPU computes, where the step does not touch them: on a stream of their own.

A state of 100 MB takes 2 ms on its way to the host, as long as ten decode steps of one sequence. Knows slots, and no
tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch


class Streams(Protocol):
    """Two queues of work on a device, one for steps and one for copies."""

    def record(self, copies: bool) -> Any:
        """Returns what comes to pass when all that a queue has now is done."""

    def wait(self, copies: bool, event: Any) -> None:
        """What a queue gets from now on waits for that."""

    def for_copies(self) -> AbstractContextManager[Any]:
        """What is launched within goes to the queue for copies; else to that for steps."""


class CudaStreams:
    """Those of a GPU: its present stream, and one more."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, copies: bool) -> torch.cuda.Event:
        event: torch.cuda.Event = self._stream(copies).record_event()
        return event

    def wait(self, copies: bool, event: torch.cuda.Event) -> None:
        self._stream(copies).wait_event(event)

    def for_copies(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._copies)

    def _stream(self, copies: bool) -> torch.cuda.Stream:
        return self._copies if copies else torch.cuda.current_stream(self._device)


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
        self._streams.wait(True, self._streams.record(False))
        with self._streams.for_copies():
            yield
        self._under_way[source] = self._under_way[target] = self._streams.record(True)

    def all_begun(self) -> Any:
        """Returns what comes to pass when all copies that were begun are made."""
        self._streams.wait(True, self._streams.record(False))
        return self._streams.record(True)

    def _wait_for(self, slots: Collection[int]) -> None:
        for slot in slots:
            if (event := self._under_way.pop(slot, None)) is not None:
                self._streams.wait(False, event)
