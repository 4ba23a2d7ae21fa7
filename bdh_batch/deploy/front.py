"""A front end on the cluster: all of a server but its connections, which Ray's proxies take."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from starlette.types import ASGIApp

from bdh_batch.deploy.bounded_app import BoundedApp
from bdh_batch.deploy.finder import Finder
from bdh_batch.http.app import create_app
from bdh_batch.http.gate import Gate, HostedModel
from bdh_batch.http.serving import Serving
from bdh_batch.http.transport.server import behind_proxies
from bdh_batch.observability.figures import Figures
from bdh_batch.observability.metrics import Metrics
from bdh_batch.observability.watched import StepRecord
from bdh_batch.processes.hosted_models import HostedModels, OneModel
from bdh_batch.processes.model_settings import ModelSettings, models_of
from bdh_batch.processes.remote_engines import RemoteEngines
from bdh_batch.processes.sampling import sample
from bdh_batch.processes.service import key_ring, open_spans
from bdh_batch.processes.upstreams import with_upstreams
from bdh_batch.settings import Settings

Pages = Callable[[], Awaitable[Mapping[str, bytes]]]  # of processes, by their names


class ModelsApart:
    """Models whose engines are on the cluster: all are loaded at the start, and none is unloaded."""

    def __init__(self, models: Sequence[OneModel]) -> None:
        self._models = models

    async def load(self) -> Sequence[HostedModel]:
        loaded = await asyncio.gather(*(model.load() for model in self._models))
        return [hosted for each in loaded for hosted in each]

    async def drain(self, seconds: float) -> None:
        await asyncio.gather(*(model.drain(seconds) for model in self._models))

    async def close(self) -> None:
        await asyncio.gather(*(model.close() for model in self._models))


class FiguresApart:
    """What the other processes of the cluster have counted. Their steps are not asked for."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def figures(self) -> Mapping[str, Figures]:
        return {name: Figures.load(page) for name, page in (await self._pages()).items()}

    async def steps(self, model: str, count: int, seconds: float) -> Mapping[str, Sequence[StepRecord]]:
        return {}


class Front:
    """A front end, from the loading of its models to its end."""

    def __init__(self, settings: Settings, serving: Serving, models: HostedModels) -> None:
        app = behind_proxies(create_app(serving, _local_only(settings)), settings.server)
        self.app: ASGIApp = BoundedApp(app, settings.limits.max_buffered_bytes)
        self._serving = serving
        self._models = models
        self._draining: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = [
            asyncio.create_task(serving.records.watch()),
            asyncio.create_task(sample(serving)),
        ]

    @classmethod
    async def open(
        cls,
        settings: Settings,
        name: str,
        secret: str,
        finder: Callable[[Callable[[], None]], Finder],
        others: Pages,
        figures: Pages,
    ) -> Front:
        """Waits until the engines of all models are there.

        Args:
            name: of this process.
            secret: what engines want to have sent.
            finder: makes what finds the engines, of what is to be called once the server drains.
            others: returns the metrics of all processes.
            figures: returns what all processes have counted.

        Raises:
            ConfigError, CheckpointError: it cannot start.
        """
        models = models_of(settings)
        label, gate = models[0].name if len(models) == 1 else "", Gate()
        metrics = Metrics(label, settings.telemetry.vllm_metrics)
        spans, keys = open_spans(settings, label), key_ring(settings.auth)
        finding = finder(lambda: front.drain())
        hosted = [
            OneModel(model, partial(_engines, model, number, finding, secret, metrics), metrics)
            for number, model in enumerate(models)
        ]
        every = with_upstreams(settings, ModelsApart(hosted), metrics)
        serving = Serving.of(settings, gate, metrics, keys, spans)
        if spans is not None:
            serving.on_close(spans.close)
        front = cls(settings, serving, every)
        front._tasks.append(asyncio.create_task(finding.watch()))
        if keys is not None:
            front._tasks.append(asyncio.create_task(keys.watch()))
        try:
            gate.open(await every.load())
        except BaseException:
            await front.close()
            raise
        metrics.join(name, partial(_without, name, others))
        metrics.watched.join(name, FiguresApart(partial(_without, name, figures)))
        return front

    def exposition(self) -> bytes:
        return self._serving.metrics.exposition()

    def figures(self) -> bytes:
        return self._serving.metrics.watched.figures().dump()

    def idle(self) -> bool:
        """Whether it takes no more requests, and has none."""
        return self._serving.gate.closed is not None and not self._serving.gate.requests()

    def problem(self) -> str | None:
        """Returns what has failed that should go on as long as it does, or None."""
        failed = (task.exception() for task in self._tasks if task.done() and not task.cancelled())
        return next((f"a task of it has ended: {error!r}" for error in failed), None)

    def drain(self) -> None:
        """Takes no more requests, and ends those with an error that run for longer than `server.drain_seconds`: Ray
        would wait for them longer, and then cut them off. Idempotent."""
        self._refuse()
        if self._draining is None:
            self._draining = asyncio.create_task(self._models.drain(self._serving.settings.server.drain_seconds))

    async def close(self, seconds: float = 0.0) -> None:
        """Waits so long for what still runs, then ends all that was started. To be called once."""
        self._refuse()
        await self._models.drain(seconds)
        tasks = [*self._tasks, *([] if self._draining is None else [self._draining])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._models.close()
        await self._serving.close()

    def _refuse(self) -> None:
        self._serving.gate.drain()
        self._serving.feed.close()  # those who watch would not end by themselves


def _engines(
    model: ModelSettings, number: int, finder: Finder, secret: str, metrics: Metrics, settings: Settings, path: Path
) -> RemoteEngines:
    moved = partial(metrics.failed_over, model.name)
    return RemoteEngines(settings, model.name, partial(finder.addresses, number), secret, moved)


async def _without(name: str, others: Pages) -> Mapping[str, bytes]:
    return {other: page for other, page in (await others()).items() if other != name}


def _local_only(settings: Settings) -> bool:
    """Whether no other machine can connect."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(settings.server.host).is_loopback
    return settings.server.host == "localhost"
