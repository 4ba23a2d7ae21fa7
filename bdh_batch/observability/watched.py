"""What can be asked of a process beyond its metrics: which tenants wait for its engines, and their next steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from prometheus_client import CollectorRegistry

from bdh_batch.observability.figures import TENANTS, Figures, TenantFigures, read_figures
from bdh_batch.observability.usage import Usage

StepRecord = Mapping[str, object]


@runtime_checkable
class WatchedEngine(Protocol):
    """The part of `engine.worker.Worker` that is looked at."""

    def queues(self, most: int) -> Mapping[str, int]:
        """Returns how many sequences of each tenant wait: of those of whom most do."""

    async def record_steps(self, count: int, seconds: float) -> Sequence[StepRecord]:
        """Returns the next steps: so many, or those within some seconds. Raises Unavailable: too many record."""


class OtherProcesses(Protocol):
    """The other processes of a server, which are asked for the same."""

    async def figures(self) -> Mapping[str, Figures]:
        """Returns the figures of each by its name, without those that do not respond."""

    async def steps(self, model: str, count: int, seconds: float) -> Mapping[str, Sequence[StepRecord]]:
        """Returns the next steps of each that computes a model, as `Watched.steps`. Raises Unavailable."""


class Watched:
    """What one process has to show, and, once it has joined others, those too.

    Args:
        registry: of its metrics.
        usage: of its tenants; None in a process that no client reaches.
    """

    def __init__(self, registry: CollectorRegistry, usage: Usage | None = None) -> None:
        self._registry = registry
        self._usage = usage
        self._started = time.time()
        self._engines: dict[str, WatchedEngine] = {}
        self._name = "server"
        self._others: OtherProcesses | None = None

    def add_engine(self, model: str, engine: object) -> None:
        """The process computes that model, by an engine that may have nothing to show."""
        if isinstance(engine, WatchedEngine):
            self._engines[model] = engine

    def join(self, name: str, others: OtherProcesses) -> None:
        """From now on, others are asked, too. `name` is that of this process among theirs."""
        self._name, self._others = name, others

    def figures(self) -> Figures:
        """Returns what it has counted so far. It takes about a millisecond."""
        tenants = {} if self._usage is None else self._usage.latest()
        for engine in self._engines.values():
            for tenant, waiting in engine.queues(TENANTS).items():
                tenants.setdefault(tenant, TenantFigures()).waiting += waiting
        return Figures(self._started, read_figures(self._registry.collect()), tenants)

    async def steps(self, model: str, count: int, seconds: float) -> Sequence[StepRecord] | None:
        """Returns the next steps of a model's engine in this process, None where it has none.

        Raises:
            Unavailable: it is being looked at by too many.
        """
        engine = self._engines.get(model)
        return None if engine is None else await engine.record_steps(count, seconds)

    async def all_figures(self) -> dict[str, Figures]:
        """Returns the figures of each process of the server, by its name."""
        others = {} if self._others is None else await self._others.figures()
        return {self._name: self.figures(), **others}

    async def all_steps(self, model: str, count: int, seconds: float) -> dict[str, Sequence[StepRecord]]:
        """Returns the next steps of each process that computes a model, by its name.

        Raises:
            Unavailable: too many look at the steps of an engine.
        """
        if self._others is None:
            own = await self.steps(model, count, seconds)
            return {} if own is None else {self._name: own}
        return dict(await self._others.steps(model, count, seconds))
