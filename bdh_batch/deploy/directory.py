"""Which processes of a server there are on a cluster: they report themselves, and are forgotten once they fall silent.

It knows nothing of Ray. Nothing is lost with it: who is there reports again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

REPORT_SECONDS = 2.0  # between two reports of a process
SILENT_SECONDS = 4 * REPORT_SECONDS  # after which it is forgotten
WAIT_SECONDS = 4.0  # that a question for changes waits at most
MOST_PROCESSES = 4096
MOST_BYTES = 2**20  # of the metrics of one process, and of its figures


@dataclass(frozen=True, slots=True)
class Listed:
    """An engine, as front ends find it.

    Args:
        model: the number of the one that it computes.
        host, port: where it listens.
        record: the file of its machine in which it records its steps.
        fingerprint: engines with the same one generate the same tokens.
    """

    name: str
    model: int
    host: str
    port: int
    record: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a process says of itself at intervals.

    Args:
        metrics: in Prometheus' text format.
        figures: what it has counted, as `observability.figures.Figures.dump` returns it.
        engine: what it is, where it is no front end.
        idle: whether it is a front end that takes no more requests, and has none.
    """

    name: str
    metrics: bytes
    figures: bytes = b""
    engine: Listed | None = None
    idle: bool = False


class Directory:
    """Remembers the latest reports.

    Args:
        clock: returns seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[Report, float]] = {}
        self._life, self._changes = secrets.token_hex(4), 0
        self._changed = asyncio.Event()
        self.draining = False

    @property
    def version(self) -> str:
        """Another one after each change of what `engines` returns, and in each directory."""
        return f"{self._life}-{self._changes}"

    def report(self, report: Report) -> str | None:
        """Remembers a report. Returns why its process cannot take part, or None."""
        self._forget_silent()
        known = report.name in self._reports
        if not known and len(self._reports) >= MOST_PROCESSES:
            return f"there are {MOST_PROCESSES} processes already"
        if report.engine is not None and (why := self._differs(report.engine)) is not None:
            return why
        if len(report.metrics) > MOST_BYTES:
            report = replace(report, metrics=b"")
        if len(report.figures) > MOST_BYTES:
            report = replace(report, figures=b"")
        self._reports[report.name] = report, self._clock()
        if not known:
            self._notify()
        return None

    def leave(self, name: str) -> None:
        """Forgets a process. Idempotent."""
        if self._reports.pop(name, None) is not None:
            self._notify()

    def drain(self) -> None:
        """From now on, front ends learn that they have to take no new requests."""
        self.draining = True
        self._notify()

    def idle(self) -> bool:
        """Whether all front ends have finished their requests, and take no more."""
        self._forget_silent()
        return all(report.idle for report, _ in self._reports.values() if report.engine is None)

    def engines(self) -> Sequence[Listed]:
        self._forget_silent()
        return [report.engine for report, _ in self._reports.values() if report.engine is not None]

    def metrics(self) -> Mapping[str, bytes]:
        """Returns the metrics of each process, by its name."""
        self._forget_silent()
        return {name: report.metrics for name, (report, _) in self._reports.items()}

    def figures(self) -> Mapping[str, bytes]:
        """Returns what each process has counted, by its name."""
        self._forget_silent()
        return {name: report.figures for name, (report, _) in self._reports.items() if report.figures}

    async def wait(self, version: str) -> None:
        """Waits until `version` is not the present one, or WAIT_SECONDS."""
        self._forget_silent()
        if version == self.version:
            try:
                await asyncio.wait_for(self._changed.wait(), WAIT_SECONDS)
            except TimeoutError:
                self._forget_silent()

    def _differs(self, engine: Listed) -> str | None:
        others = [each for each in self.engines() if each.model == engine.model and each.name != engine.name]
        if any(each.fingerprint != engine.fingerprint for each in others):
            return "the weights, dtypes or kernels are not those of the engines that there are"
        return None

    def _forget_silent(self) -> None:
        now = self._clock()
        silent = [name for name, (_, at) in self._reports.items() if now - at > SILENT_SECONDS]
        for name in silent:
            del self._reports[name]
        if silent:
            self._notify()

    def _notify(self) -> None:
        self._changes += 1
        self._changed.set()
        self._changed = asyncio.Event()
