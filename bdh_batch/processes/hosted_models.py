"""The models that a process serves, loaded or not, as the gate has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.gate import HostedModel, ModelInfo, ServedModel
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.engines import Engines
from bdh_batch.processes.loaded_models import State
from bdh_batch.processes.model_settings import ModelSettings, chosen_model
from bdh_batch.processes.open_model import OpenModel
from bdh_batch.settings import Settings


class HostedModels(Protocol):
    """All models of a process."""

    async def load(self) -> Sequence[HostedModel]:
        """Waits until requests can be accepted.

        Raises:
            ConfigError, CheckpointError: the only model cannot be loaded.
        """

    async def drain(self, seconds: float) -> None:
        """Waits until running requests have finished; after `seconds`, ends the others with an error."""

    async def close(self) -> None:
        """Ends all that was started. Idempotent."""


def model_info(model: ModelSettings, path: Path | None) -> ModelInfo:
    """Returns what the API reports of a model; `path` is None where it is not there."""
    try:
        created = time.time() if path is None else path.stat().st_mtime
    except OSError:  # whoever loads it is told
        created = time.time()
    return ModelInfo(model.name, tuple(model.settings.model.aliases), int(created), model.settings.model.max_model_len)


class OneModel:
    """The model of a process that computes it itself: loaded when the process starts, and never unloaded.

    Args:
        engines: makes the engine, from the settings and the model's path.
    """

    def __init__(self, model: ModelSettings, engines: Callable[[Settings, Path], Engines], metrics: Metrics) -> None:
        self._model = model
        self._engines = engines
        self._metrics = metrics
        self._open: OpenModel | None = None

    async def load(self) -> Sequence[HostedModel]:
        located = chosen_model(self._model.settings)
        info = model_info(self._model, located.path)
        engines = self._engines(self._model.settings, located.path)
        self._open = await OpenModel.load(self._model, info, located, engines, self._metrics)
        return [AlwaysLoaded(self._open)]

    async def drain(self, seconds: float) -> None:
        if self._open is not None:
            await self._open.backend.drain(seconds)

    async def close(self) -> None:
        if self._open is not None:
            await self._open.close()


class AlwaysLoaded:
    """A hosted model that cannot be unloaded."""

    state = State.LOADED

    def __init__(self, opened: OpenModel) -> None:
        self._open = opened

    @property
    def info(self) -> ModelInfo:
        return self._open.served.info

    @property
    def fingerprint(self) -> str | None:
        return self._open.served.fingerprint

    def acquire(self) -> ServedModel | None:
        return self._open.served

    def release(self) -> None:
        """It stays loaded."""

    async def load(self, seconds: float | None = None) -> None:
        """It is loaded."""

    async def load_for_good(self) -> None:
        """It is loaded."""

    async def unload(self) -> None:
        text = "The model is computed in the server's own process; a server of several `models` can unload them."
        raise InvalidRequest(text, "model")

    def requests(self) -> int:
        return self._open.backend.load()

    def ready(self) -> str | None:
        return self._open.backend.ready()

    def health(self) -> str | None:
        return self._open.backend.health()

    def engines(self) -> Sequence[Mapping[str, object]]:
        return self._open.engines()
