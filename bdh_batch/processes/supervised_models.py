"""The models of a front end: their engines are in other processes, which the supervisor starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bdh_batch.errors import CheckpointError, ConfigError, QueueFull, QueueTimeout, Unavailable
from bdh_batch.http.gate import HostedModel, ServedModel
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.hosted_models import model_info
from bdh_batch.processes.loaded_models import State, could_not_load
from bdh_batch.processes.model_settings import ModelSettings, chosen_model
from bdh_batch.processes.open_model import OpenModel
from bdh_batch.processes.remote_engines import RemoteEngines
from bdh_batch.processes.supervisor_link import SupervisorLink

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # after which what could not be read is read again
LINGER_SECONDS = 1.0  # that a model on demand is held after its last request: the next one need not ask for it


class SupervisedModel:
    """One model. It is held, so that it is not unloaded, from its first request to some time after its last one."""

    def __init__(
        self, number: int, model: ModelSettings, folder: RuntimeFolder, link: SupervisorLink, metrics: Metrics
    ) -> None:
        self.alone = False  # whether it is the only model
        self.failure: ConfigError | CheckpointError | None = None  # of what this process needs of the model
        self.changed = asyncio.Event()  # of the two; a new one after each change
        self._state = State.UNLOADED  # as the supervisor says
        self.is_known = False  # whether it has said so
        self._number = number
        self._model = model
        self._folder = folder
        self._link = link
        self._metrics = metrics
        self._open: OpenModel | None = None
        self._held = False
        self._opening = False  # it is not given back meanwhile
        self._wanted_back = False  # the supervisor waits until its requests have ended
        self._retry = 0.0  # before which it is not read again, after that has failed
        self._users = 0  # requests
        self._waiting = 0  # requests, until it is loaded
        self._loading: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self.info = model_info(model, _path(model))

    @property
    def state(self) -> State:
        return self._state if self.failure is None else State.FAILED

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def fingerprint(self) -> str | None:
        return None if self._open is None else self._open.served.fingerprint

    @property
    def is_loaded(self) -> bool:
        return self.state is State.LOADED

    @property
    def is_open(self) -> bool:
        """Whether this process has what it needs of the model."""
        return self._open is not None

    def acquire(self) -> ServedModel | None:
        if self._open is None or not self._held or self._wanted_back:
            return None
        self._users += 1
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        return self._open.served

    def release(self) -> None:
        self._users -= 1
        self._linger()

    async def load(self, seconds: float | None = None) -> None:
        chosen = self._model.settings.scheduler
        if self._waiting >= chosen.max_queued_requests:
            raise QueueFull(f"Too many requests wait for the model {self.info.name}.", retry_after=5)
        self._waiting += 1
        try:
            limits = (seconds, chosen.queue_timeout, chosen.request_timeout)
            async with asyncio.timeout(min((limit for limit in limits if limit is not None), default=None)):
                await asyncio.shield(self._begin_load())
        except TimeoutError:
            raise QueueTimeout(f"The model {self.info.name} was not loaded in time.") from None
        finally:
            self._waiting -= 1

    async def load_for_good(self) -> None:
        await self._link.run("load", self._number)
        await asyncio.shield(self._begin_load())

    async def unload(self) -> None:
        await self._link.run("unload", self._number)

    def requests(self) -> int:
        return 0 if self._open is None else self._open.backend.load()

    def ready(self) -> str | None:
        if self._model.on_demand:
            return None
        if self._open is not None:
            return self._open.backend.ready()
        return f"the model {self.info.name} is {self.state}" if self.alone else None  # others are served without it

    def health(self) -> str | None:
        return None if self._open is None else self._open.backend.health()

    def engines(self) -> Sequence[Mapping[str, object]]:
        return () if self._open is None else self._open.engines()

    def on_state(self, state: State) -> None:
        """The supervisor says that the model is now in `state`."""
        self._state, self.is_known = state, True
        if state is State.LOADED:
            self._wanted_back = False  # where it was to be unloaded, it stays
            if not self._model.on_demand:
                self._begin_load()
        elif state in (State.UNLOADED, State.FAILED) and self._open is not None:
            self._closing = asyncio.create_task(self.close())
        self._notify()

    def on_give_back(self) -> None:
        """The supervisor waits until the model's requests have ended."""
        self._wanted_back = True  # until it says that the model is loaded: it lets nobody hold it before
        if not self._opening:
            self._give_back()

    async def drain(self, seconds: float) -> None:
        """Waits until running requests have finished; after `seconds`, ends the others with an error."""
        if self._open is not None:
            await self._open.backend.drain(seconds)

    async def close(self) -> None:
        """Ends what this process needs of the model. Idempotent."""
        opened, self._open = self._open, None
        if opened is not None:
            await opened.close()

    def _begin_load(self) -> asyncio.Task[None]:
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load())
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # may be nobody's
        return self._loading

    async def _load(self) -> None:
        if self._closing is not None:
            await asyncio.wait([self._closing])
        self._opening = True  # from when the supervisor may think that it is held
        try:
            await self._link.run("acquire", self._number)
            self._held = True
            await self._ensure_open()
        finally:
            self._opening = False
            self._notify()
            self._linger()

    async def _ensure_open(self) -> None:
        """Reads what this process needs of the model. Raises Unavailable: it cannot, or could not a moment ago."""
        now = asyncio.get_running_loop().time()
        if self._open is None and now < self._retry:
            self._give_back()
            raise Unavailable(could_not_load(self.name), retry_after=math.ceil(self._retry - now))
        if self._open is None:
            try:
                located = chosen_model(self._model.settings)
                moved = partial(self._metrics.failed_over, self.name)
                folder = self._folder.of_model(self._number)
                engines = RemoteEngines(self._model.settings, self.name, folder.engines, folder.secret, moved)
                self._open = await OpenModel.load(self._model, self.info, located, engines, self._metrics)
            except (ConfigError, CheckpointError, OSError) as error:
                log.error("the model %s cannot be loaded: %s", self.info.name, error)
                self.failure = ConfigError(str(error)) if isinstance(error, OSError) else error
                self._retry = asyncio.get_running_loop().time() + RETRY_SECONDS
                self._give_back()
                raise Unavailable(could_not_load(self.name), retry_after=math.ceil(RETRY_SECONDS)) from error
        self.failure = None

    def _linger(self) -> None:
        """Holds the model some time longer, where no request uses it."""
        if self._users:
            return
        if self._wanted_back:
            self._give_back()
        elif self._model.on_demand:
            if self._lingering is not None:
                self._lingering.cancel()
            self._lingering = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._give_back)

    def _give_back(self) -> None:
        if self._held and not self._users:
            self._held = self._wanted_back = False
            with contextlib.suppress(Unavailable):  # the supervisor has ended
                self._link.tell("release", self._number)

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class SupervisedModels:
    """All models of a front end.

    Args:
        folder: of the server's processes.
    """

    def __init__(self, models: Sequence[ModelSettings], folder: RuntimeFolder, metrics: Metrics) -> None:
        self._folder = folder
        self._link = SupervisorLink(
            lambda number, state: self._models[number].on_state(state),
            lambda number: self._models[number].on_give_back(),
        )
        self._models = [
            SupervisedModel(number, model, folder, self._link, metrics) for number, model in enumerate(models)
        ]
        metrics.watch_models(lambda: self._models)
        self._models[0].alone = len(models) == 1
        self._warm = [hosted for hosted, model in zip(self._models, models, strict=True) if not model.on_demand]

    async def load(self) -> Sequence[HostedModel]:
        await self._link.connect(self._folder.control)
        for model in self._warm:
            while not model.is_open and not self._given_up(model):
                await model.changed.wait()
        return self._models

    def _given_up(self, model: SupervisedModel) -> bool:
        """Whether the others are not to wait for a model. Raises ConfigError, CheckpointError: there are no others."""
        if model.alone and model.failure is not None:
            raise model.failure
        if model.is_known and model.state is State.UNLOADED:  # an operator has unloaded it
            return True
        return not model.alone and model.state is State.FAILED

    async def drain(self, seconds: float) -> None:
        await asyncio.gather(*(model.drain(seconds) for model in self._models))

    async def close(self) -> None:
        self._link.close()
        await asyncio.gather(*(model.close() for model in self._models))


def _path(model: ModelSettings) -> Path | None:
    try:
        located = chosen_model(model.settings)
    except (ConfigError, CheckpointError):
        return None  # whoever loads it is told
    located.close()
    return located.path
