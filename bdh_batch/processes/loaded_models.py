"""Decides which models of a server are loaded: at their first request, and until others need the room.

A front end holds a model while requests use it. A model is unloaded when no front end holds it: because it is on
demand and was not used for a while, because another one needs its room, or because an operator says so. What runs is
never cut off: a front end that is asked for a model back ends its requests first, and lets new ones wait.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from bdh_batch.errors import BDHError, InvalidRequest, ModelInUse, Unavailable

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds until a model that could not be loaded is tried again
TURN_SECONDS = 10.0  # that a model stays loaded at least, before it has to make room in the midst of its requests


class State(StrEnum):
    """What a model is doing."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"  # the last attempt to load it has


class CannotLoad(BDHError):
    """A model's engines cannot start. Raised to whoever loads it.

    Args:
        for_memory: whether memory is lacking.
    """

    def __init__(self, reason: str, for_memory: bool = False) -> None:
        super().__init__(reason)
        self.for_memory = for_memory


class Starter(Protocol):
    """Starts and ends the engines of a model, which its number says."""

    async def start(self, model: int) -> None:
        """Returns when one is ready. Raises CannotLoad."""

    async def stop(self, model: int) -> None:
        """Returns when all have ended."""


class Holder(Protocol):
    """A front end that holds models."""

    def give_back(self, model: int) -> None:
        """Asks for a model back: the holder releases it when its requests have ended."""


@dataclass(eq=False)
class LoadedModel:
    """A model, and who holds it."""

    number: int
    name: str
    on_demand: bool
    keep_alive: float
    state: State = State.UNLOADED
    holders: set[Holder] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # of its state or holders; a new one after each
    transition: asyncio.Task[None] | None = None  # that loads or unloads it
    awaited: int = 0  # how many wait for it
    since: float = 0.0  # when it was loaded
    used: float = 0.0  # when it was released last
    yielding: bool = False  # its holders are asked for it, as another model needs its room; new ones wait
    off: bool = False  # an operator has unloaded it
    problem: str = ""
    retry: float = 0.0  # before which it is not loaded again, after it has failed
    wait: float = FIRST_WAIT

    @property
    def idle(self) -> bool:
        return self.state is State.LOADED and not self.holders and (self.yielding or not self.awaited)


class LoadedModels:
    """The models of a server.

    Args:
        models: in the order of their numbers, unloaded.
        most: that may be loaded at once.
        announce: is called when a model's state has changed.
        drain_seconds: within which a model's requests have to end when an operator unloads it.
    """

    def __init__(
        self,
        models: Sequence[LoadedModel],
        most: int,
        starter: Starter,
        announce: Callable[[LoadedModel], None],
        drain_seconds: float,
    ) -> None:
        self.models = models
        self._most = most
        self._starter = starter
        self._announce = announce
        self._drain_seconds = drain_seconds
        self._room = asyncio.Lock()  # one makes room at a time
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self) -> None:
        """Begins to load the models that are not on demand, and to unload those that are idle."""
        for model in self.models:
            self._spawn(self._unload_when_idle(model) if model.on_demand else self._keep(model))

    def close(self) -> None:
        """Ends all that is under way; nothing is loaded any more. Idempotent."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    async def acquire(self, holder: Holder, number: int) -> None:
        """Waits until a model is loaded, and has `holder` hold it.

        Raises:
            Unavailable: it cannot be loaded, or an operator has unloaded it.
        """
        model = self.models[number]
        model.awaited += 1
        try:
            while model.state is not State.LOADED or model.yielding:
                if model.state is State.LOADED:
                    await self._change_of(model, math.inf)
                    continue
                if model.off and model.transition is None:
                    raise Unavailable(f"The model {model.name} has been unloaded.", retry_after=30)
                await self._load(model)
            model.holders.add(holder)
        finally:
            model.awaited -= 1
            model.used = self._now()
            _notify(model)

    def release(self, holder: Holder, number: int) -> None:
        """Has `holder` no longer hold a model."""
        model = self.models[number]
        if holder in model.holders:
            model.holders.discard(holder)
            model.used = self._now()
            _notify(model)

    def leave(self, holder: Holder) -> None:
        """Releases whatever `holder` held: it has ended."""
        for model in self.models:
            self.release(holder, model.number)

    async def load(self, number: int) -> None:
        """Loads a model, as an operator says. Raises Unavailable."""
        model = self.models[number]
        model.off, model.retry, model.used = False, 0.0, self._now()
        _notify(model)
        while model.state is not State.LOADED:
            await self._load(model)

    async def unload(self, number: int) -> None:
        """Unloads a model when its requests have ended, as an operator says.

        Raises:
            ModelInUse: they do not end in time; it stays loaded.
            InvalidRequest: it is not loaded.
        """
        model = self.models[number]
        while model.transition is not None:
            await asyncio.wait([model.transition])
        if model.state is State.FAILED and not model.on_demand:
            model.off = True
            return self._set(model, State.UNLOADED)
        if model.state is not State.LOADED:
            raise InvalidRequest(f"The model {model.name} is not loaded.", "model")
        await asyncio.shield(self._begin(model, self._unload_for_good(model)))
        if model.problem:
            raise Unavailable(f"The model {model.name} could not be unloaded: {model.problem}.", retry_after=5)

    async def _unload_for_good(self, model: LoadedModel) -> None:
        model.problem = ""
        model.off = not model.on_demand
        try:
            await self._unload(model, self._drain_seconds)
        except ModelInUse:
            model.off = False
            raise

    async def _load(self, model: LoadedModel) -> None:
        """Waits for the transition under way, or else for a new one that loads the model. Raises Unavailable."""
        if self._closed:
            raise Unavailable("The server is shutting down.", retry_after=5)
        if model.transition is None:
            if (left := model.retry - self._now()) > 0:
                raise Unavailable(could_not_load(model.name), retry_after=math.ceil(left))
            self._begin(model, self._start(model))
        assert model.transition is not None
        await asyncio.wait([model.transition])
        if model.state is State.FAILED:
            raise Unavailable(could_not_load(model.name), retry_after=math.ceil(model.wait))

    def _begin(self, model: LoadedModel, transition: Awaitable[None]) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await transition
            except OSError as error:  # no process, memory or descriptor is left
                log.exception("the model %s cannot be loaded or unloaded", model.name)
                self._fail(model, str(error))
            finally:
                model.transition = None

        model.transition = self._spawn(run())
        return model.transition

    async def _start(self, model: LoadedModel) -> None:
        async with self._room:
            await self._make_room(model)
            self._set(model, State.LOADING)
        try:
            await self._start_with_room(model)
        except CannotLoad as error:
            log.error("the model %s cannot be loaded: %s", model.name, error)
            self._fail(model, str(error))
            return
        model.problem, model.wait = "", FIRST_WAIT
        model.since = model.used = self._now()
        self._set(model, State.LOADED)

    async def _start_with_room(self, model: LoadedModel) -> None:
        """Starts a model; where memory is lacking, after others that are idle have been unloaded, one by one."""
        while True:
            try:
                return await self._starter.start(model.number)
            except CannotLoad as error:
                idle = [each for each in self._on_demand(model) if each.idle]
                if not error.for_memory or not idle:
                    raise
                await self._unload_for(model, idle[0])

    async def _make_room(self, wanted: LoadedModel) -> None:
        """Unloads the model on demand that has been used least recently, where as many as may be are loaded.

        Where all are in use, one that has had its turn is asked for: its requests end, and new ones wait, for as long
        as a drain may take. Then it has another turn, and one is asked for again.
        """
        asked: LoadedModel | None = None
        since = 0.0
        try:
            while sum(each.state not in (State.UNLOADED, State.FAILED) for each in self.models) >= self._most:
                others = self._on_demand(wanted)
                if (idle := next((each for each in others if each.idle), None)) is not None:
                    await self._unload_for(wanted, idle)
                    continue
                now = self._now()
                asked = asked or next((each for each in others if now - each.since >= TURN_SECONDS), None)
                if asked is not None and not asked.yielding:
                    self._ask_for(asked)
                    since = now
                elif asked is not None and now - since >= self._drain_seconds:
                    asked.since = now
                    self._keep_loaded(asked)
                    asked = None
                await self._change(TURN_SECONDS / 10)
        finally:
            if asked is not None and asked.yielding:
                self._keep_loaded(asked)

    async def _unload_for(self, wanted: LoadedModel, idle: LoadedModel) -> None:
        log.info("the model %s is unloaded to make room for %s", idle.name, wanted.name)
        await self._begin(idle, self._unload(idle, math.inf))

    def _keep_loaded(self, model: LoadedModel) -> None:
        """Has the requests go on that wait for a model whose holders were asked for it."""
        model.yielding = False
        self._set(model, model.state)

    @staticmethod
    def _ask_for(model: LoadedModel) -> None:
        model.yielding = True
        for holder in model.holders:
            holder.give_back(model.number)

    def _on_demand(self, wanted: LoadedModel) -> list[LoadedModel]:
        """The models that may have to make room, the least recently used first."""
        found = [
            each
            for each in self.models
            if each is not wanted and each.on_demand and each.state is State.LOADED and each.transition is None
        ]
        return sorted(found, key=lambda each: each.used)

    async def _unload(self, model: LoadedModel, seconds: float) -> None:
        """Unloads a model once its holders have released it. Raises ModelInUse: they do not within `seconds`."""
        self._set(model, State.UNLOADING)
        self._ask_for(model)
        end = self._now() + seconds
        while model.holders:
            if self._now() >= end:
                model.yielding = False
                self._set(model, State.LOADED)
                text = f"Requests of the model {model.name} still run after {seconds:.0f} seconds; it stays loaded."
                raise ModelInUse(text)
            await self._change_of(model, end - self._now())
        await self._starter.stop(model.number)
        model.yielding = False
        self._set(model, State.UNLOADED)

    async def _keep(self, model: LoadedModel) -> None:
        """Loads a model at once, and again where that has failed, as long as no operator unloads it."""
        while True:
            if self._is_wanted(model):
                await asyncio.sleep(max(0.0, model.retry - self._now()))
                if self._is_wanted(model):
                    self._begin(model, self._start(model))
            await self._change_of(model, math.inf)

    @staticmethod
    def _is_wanted(model: LoadedModel) -> bool:
        return model.state in (State.UNLOADED, State.FAILED) and not model.off and model.transition is None

    async def _unload_when_idle(self, model: LoadedModel) -> None:
        while True:
            settled = model.idle and model.transition is None
            left = model.used + model.keep_alive - self._now() if settled else math.inf
            if left <= 0:
                log.info("the model %s is unloaded: it was not used for %.0f s", model.name, model.keep_alive)
                await self._begin(model, self._unload(model, math.inf))
                continue
            await self._change_of(model, left)

    def _fail(self, model: LoadedModel, problem: str) -> None:
        model.problem, model.retry = problem, self._now() + model.wait
        model.wait = min(2 * model.wait, LONGEST_WAIT)
        self._set(model, State.FAILED)

    def _set(self, model: LoadedModel, state: State) -> None:
        model.state = state
        self._announce(model)
        _notify(model)

    async def _change(self, seconds: float) -> None:
        """Waits for a change of any model, or so long."""
        waiting = [asyncio.ensure_future(each.changed.wait()) for each in self.models]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    async def _change_of(self, model: LoadedModel, seconds: float) -> None:
        waiting = asyncio.ensure_future(model.changed.wait())
        await asyncio.wait([waiting], timeout=None if seconds == math.inf else max(0.0, seconds))
        waiting.cancel()

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def could_not_load(name: str) -> str:
    """Returns what clients are told of a model that cannot be loaded, whichever process finds that."""
    return f"The model {name} could not be loaded. The server's log has the reason."


def _notify(model: LoadedModel) -> None:
    """Wakes whoever waits for a change of the model."""
    model.changed.set()
    model.changed = asyncio.Event()
