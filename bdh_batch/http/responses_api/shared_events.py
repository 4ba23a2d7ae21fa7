"""The events of responses in the background, of this process and of the server's others: a response runs in the process
that it came to, and who asks for its events may come to any."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from bdh_batch.errors import Unavailable
from bdh_batch.http.responses.frames import COMMENT, DONE
from bdh_batch.http.responses_api.background import EventLog
from bdh_batch.http.responses_api.frames import problem_event

FindLog = Callable[[str, str], EventLog | None]  # by the owner and the id of a response


class OtherProcesses(Protocol):
    """The other processes of the server: `processes.others.Others`."""

    async def earliest_event(self, owner: str, id: str) -> tuple[str, int] | None:
        """The process that has the events of a response, and the number of the earliest; None where none has."""

    def events(self, process: str, owner: str, id: str, after: int, keepalive: float) -> AsyncIterator[bytes]:
        """What `EventLog.read` yields there, with comments also where `keepalive` is 0. Raises OSError where that
        process ends before, or is silent."""


@dataclass(frozen=True, slots=True)
class OtherLog:
    """The events of a response that another process has."""

    earliest: int
    _process: str
    _owner: str
    _id: str
    _others: OtherProcesses

    async def read(self, after: int, keepalive: float = 0) -> AsyncIterator[bytes]:
        """As `EventLog.read`. Where that process ends before the response, or does nothing any more, the last event is
        an error."""
        number, rest = after + 1, b""
        try:
            async for piece in self._others.events(self._process, self._owner, self._id, after, keepalive):
                begun, end, rest = (rest + piece).rpartition(b"\n\n")
                if events := begun + end:
                    number += events.count(b"\n\n") - events.count(COMMENT)
                    yield events if keepalive else events.replace(COMMENT, b"")
        except OSError:
            error = Unavailable("The process that computed the response has ended.", 1)
            yield problem_event(number, error) + DONE


class SharedEvents:
    """Finds the events of a response, wherever it runs."""

    def __init__(self) -> None:
        self._own: FindLog | None = None
        self._others: OtherProcesses | None = None

    def offer(self, own: FindLog) -> None:
        """From now on, others find what this process has."""
        self._own = own

    def join(self, others: OtherProcesses) -> None:
        """From now on, what this process does not have is asked for from others."""
        self._others = others

    def own(self, owner: str, id: str) -> EventLog | None:
        """What this process has."""
        return None if self._own is None else self._own(owner, id)

    async def find(self, owner: str, id: str) -> EventLog | OtherLog | None:
        """What this process has, or another one of the server; None where the events are not kept any more."""
        if (log := self.own(owner, id)) is not None:
            return log
        found = None if self._others is None else await self._others.earliest_event(owner, id)
        if found is None:
            return None
        assert self._others is not None
        process, earliest = found
        return OtherLog(earliest, process, owner, id, self._others)
