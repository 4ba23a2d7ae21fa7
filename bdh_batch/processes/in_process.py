"""A server without connections: one model in this process, and what requests to it are served with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from bdh_batch.engine.loading import load_engine, start_worker
from bdh_batch.http.gate import Gate, ServedModel
from bdh_batch.http.serving import Serving
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.hosted_models import OneModel
from bdh_batch.processes.local_engine import LoadEngine, LocalEngine, StartEngine
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.settings import Settings

if TYPE_CHECKING:
    from bdh_batch.observability.spans import Spans


def hosted(
    model: ModelSettings, load: LoadEngine | None = None, start: StartEngine | None = None
) -> Callable[[Metrics, Spans | None], OneModel]:
    """Returns what makes the model of a process that computes it itself, from the metrics and spans of that.

    Args:
        load: makes the engine, off the event loop; None is `engine.loading.load_engine`.
        start: has it compute, on the event loop; None is `engine.loading.start_worker`.
    """

    def of(metrics: Metrics, spans: Spans | None) -> OneModel:
        of_engine = EngineMetrics(metrics.registry, model.name)
        observer = of_engine if spans is None else spans.beside(of_engine)
        show = partial(metrics.watched.add_engine, model.name)
        engine = partial(LocalEngine, metrics=of_engine, observer=observer, show=show, load=load or load_engine)
        return OneModel(model, partial(engine, start=start or start_worker), metrics)

    return of


class InProcess:
    """A model that is loaded, and what serves requests to it: all of a server but its connections.

    Everything of it belongs to the event loop that it was opened on.
    """

    def __init__(self, serving: Serving, models: OneModel, served: ServedModel) -> None:
        self.serving = serving
        self.served = served
        self._models = models
        self._tidying = asyncio.create_task(serving.records.watch())
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, model: ModelSettings, settings: Settings) -> InProcess:
        """Loads the model. Raises ConfigError, CheckpointError."""
        metrics, gate = Metrics(model.name), Gate()
        models = hosted(model)(metrics, None)
        serving = Serving.of(settings, gate, metrics)
        try:
            hosts = await models.load()
            gate.open(hosts)
            served = hosts[0].acquire()
            assert served is not None
            return cls(serving, models, served)
        except BaseException:
            await models.close()
            await serving.close()
            raise

    async def close(self) -> None:
        """Ends what runs with an error, then all that was started. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.serving.gate.drain()
        await self._models.drain(0)
        self._tidying.cancel()
        await asyncio.gather(self._tidying, return_exceptions=True)
        await self._models.close()
        await self.serving.close()
