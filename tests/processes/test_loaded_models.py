"""Which models are loaded, in virtual time: engines are fakes that start and stop at once, or as they are told."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bdh_batch.errors import InvalidRequest, ModelInUse, Unavailable
from bdh_batch.processes.loaded_models import TURN_SECONDS, CannotLoad, LoadedModel, LoadedModels, State


class _Selector(selectors.SelectSelector):
    """Lets virtual time pass where there would be a wait."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        return found


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(work)


class Engines:
    """Starts and ends the engines of models."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.starts: Counter[int] = Counter()
        self.most = 0
        self.stopped = asyncio.Event()
        self.problems: dict[int, CannotLoad] = {}

    async def start(self, model: int) -> None:
        assert model not in self.running
        self.starts[model] += 1
        await asyncio.sleep(1.0)
        if model in self.problems:
            raise self.problems[model]
        self.running.add(model)
        self.most = max(self.most, len(self.running))

    async def stop(self, model: int) -> None:
        await asyncio.sleep(0.5)
        self.running.remove(model)
        self.stopped.set()


class FrontEnd:
    """Holds models, and gives one back when its requests have ended."""

    def __init__(self, models: LoadedModels, engines: Engines) -> None:
        self._models = models
        self._engines = engines
        self._users: dict[int, int] = {}
        self._wanted_back: set[int] = set()

    async def request(self, model: int, seconds: float) -> None:
        if not self._users.get(model) or model in self._wanted_back:
            await self._models.acquire(self, model)
            self._wanted_back.discard(model)
        self._users[model] = self._users.get(model, 0) + 1
        for _ in range(4):
            assert model in self._engines.running, "a request runs without its engine"
            await asyncio.sleep(seconds / 4)
        self._users[model] -= 1
        if not self._users[model]:
            self._models.release(self, model)
            self._wanted_back.discard(model)

    def give_back(self, model: int) -> None:
        self._wanted_back.add(model)


def models_of(*keep_alive: float | None, most: int = 8) -> tuple[LoadedModels, Engines]:
    """A model for each number: seconds that it is kept on demand; None is one that is always loaded."""
    engines = Engines()
    models = [
        LoadedModel(number, f"m{number}", seconds is not None, math.inf if seconds is None else seconds)
        for number, seconds in enumerate(keep_alive)
    ]
    return LoadedModels(models, most, engines, lambda model: None, drain_seconds=30.0), engines


def states(models: LoadedModels) -> list[str]:
    return [str(model.state) for model in models.models]


def test_models_are_loaded_at_the_start_or_at_their_first_request_and_unloaded_when_idle() -> None:
    async def scenario() -> None:
        models, engines = models_of(None, 5.0)
        front = FrontEnd(models, engines)
        models.start()
        await asyncio.sleep(2)
        assert states(models) == ["loaded", "unloaded"]
        await asyncio.gather(*(front.request(1, 20) for _ in range(3)))
        assert engines.starts == {0: 1, 1: 1}
        await asyncio.sleep(4.9)
        assert states(models) == ["loaded", "loaded"]
        await asyncio.sleep(1)
        assert states(models) == ["loaded", "unloaded"]
        await front.request(1, 1)
        assert engines.starts[1] == 2
        models.close()

    run(scenario())


def test_the_least_recently_used_makes_room_and_what_runs_ends_first() -> None:
    async def scenario() -> None:
        models, engines = models_of(math.inf, math.inf, math.inf, most=2)
        front = FrontEnd(models, engines)
        models.start()
        for model in (0, 1, 0, 2):
            await front.request(model, 1)
        assert states(models) == ["loaded", "unloaded", "loaded"]
        long = asyncio.create_task(front.request(0, 20))
        await asyncio.sleep(1)
        other = asyncio.create_task(front.request(2, 300))
        await asyncio.sleep(1)
        third = asyncio.create_task(front.request(1, 1))
        await asyncio.sleep(TURN_SECONDS + 1)
        assert models.models[0].yielding  # used less recently than 2; its request goes on
        again = asyncio.create_task(front.request(0, 1))
        await long
        await third
        assert not other.done()
        await again  # it had its turn after the third
        assert states(models) == ["loaded", "unloaded", "loaded"]
        await other
        assert engines.most == 2
        models.close()

    run(scenario())


def test_one_that_cannot_be_loaded_harms_no_other_and_is_tried_again_later() -> None:
    async def scenario() -> None:
        models, engines = models_of(None, 5.0, None)
        front = FrontEnd(models, engines)
        engines.problems = {0: CannotLoad("no file"), 1: CannotLoad("no file")}
        models.start()
        await asyncio.sleep(1.2)
        assert states(models) == ["failed", "unloaded", "loaded"]
        for _ in range(50):
            with pytest.raises(Unavailable, match="m1 could not be loaded"):
                await front.request(1, 1)
        assert engines.starts[1] == 1  # no request begins another attempt before its time
        await front.request(2, 1)
        engines.problems = {}
        await asyncio.sleep(5)
        await front.request(1, 1)
        assert states(models) == ["loaded", "loaded", "loaded"]
        models.close()

    run(scenario())


def test_where_memory_lacks_idle_models_make_room() -> None:
    async def scenario() -> None:
        models, engines = models_of(math.inf, math.inf, math.inf)
        front = FrontEnd(models, engines)
        models.start()
        for model in (0, 1):
            await front.request(model, 1)
        engines.problems = {2: CannotLoad("too large", for_memory=True)}

        async def unloaded() -> None:
            await engines.stopped.wait()
            engines.problems = {}

        await asyncio.gather(front.request(2, 1), unloaded())
        assert states(models) == ["unloaded", "loaded", "loaded"]
        models.close()

    run(scenario())


def test_one_long_request_does_not_hold_up_others_of_its_model() -> None:
    async def scenario() -> None:
        models, engines = models_of(math.inf, math.inf, most=1)
        front = FrontEnd(models, engines)
        models.start()
        long = asyncio.create_task(front.request(0, 7200))
        await asyncio.sleep(20)
        other = asyncio.create_task(front.request(1, 1))
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        await front.request(0, 1)
        assert asyncio.get_running_loop().time() - began <= 40  # a drain takes 30 at most
        assert not long.done()
        await long
        await other
        assert states(models) == ["unloaded", "loaded"]
        models.close()

    run(scenario())


def test_two_operators_unload_once() -> None:
    async def scenario() -> None:
        models, engines = models_of(None)
        models.start()
        await asyncio.sleep(2)
        front = FrontEnd(models, engines)
        running = asyncio.create_task(front.request(0, 5))
        await asyncio.sleep(1)
        found = await asyncio.gather(*(models.unload(0) for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in found] == [type(None), InvalidRequest, InvalidRequest]
        await running
        assert states(models) == ["unloaded"]
        models.close()

    run(scenario())


def test_an_operator_unloads_and_loads() -> None:
    async def scenario() -> None:
        models, engines = models_of(None, math.inf)
        front = FrontEnd(models, engines)
        models.start()
        await front.request(0, 1)
        with pytest.raises(InvalidRequest, match="m1 is not loaded"):
            await models.unload(1)
        short = asyncio.create_task(front.request(0, 10))
        await asyncio.sleep(1)
        await models.unload(0)
        assert short.done()
        assert states(models) == ["unloaded", "unloaded"]
        with pytest.raises(Unavailable, match="m0 has been unloaded"):
            await front.request(0, 1)
        await models.load(0)
        long = asyncio.create_task(front.request(0, 100))
        await asyncio.sleep(1)
        with pytest.raises(ModelInUse, match="still run after 30 seconds"):
            await models.unload(0)
        await front.request(0, 1)
        await long
        await models.load(1)
        await models.unload(1)
        await front.request(1, 1)  # it is on demand
        models.close()

    run(scenario())


def test_what_a_front_end_held_is_free_when_it_has_ended() -> None:
    async def scenario() -> None:
        models, engines = models_of(5.0)
        front = FrontEnd(models, engines)
        models.start()
        killed = asyncio.create_task(front.request(0, 1000))
        await asyncio.sleep(2)
        killed.cancel()
        await asyncio.sleep(100)
        assert states(models) == ["loaded"]
        models.leave(front)
        await asyncio.sleep(6)
        assert states(models) == ["unloaded"]
        models.close()

    run(scenario())


REQUEST = st.tuples(st.integers(0, 3), st.floats(0.1, 30), st.floats(0, 20))  # model, seconds, pause before it


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(REQUEST, max_size=6), min_size=1, max_size=5), st.integers(2, 4))
def test_every_request_is_served_and_no_more_models_are_loaded_than_may_be(
    fronts: list[list[tuple[int, float, float]]], most: int
) -> None:
    async def scenario() -> None:
        models, engines = models_of(None, 1.0, 5.0, math.inf, most=most)
        models.start()

        async def client(front: FrontEnd, requests: list[tuple[int, float, float]]) -> None:
            for model, seconds, pause in requests:
                await asyncio.sleep(pause)
                await front.request(model, seconds)

        async with asyncio.timeout(10_000):  # virtual seconds: nobody waits for ever
            shared = FrontEnd(models, engines)
            own = [FrontEnd(models, engines) for _ in fronts]
            await asyncio.gather(
                *(client(front, requests) for front, requests in zip(own, fronts, strict=True)),
                *(client(shared, requests) for requests in fronts),
            )
        assert engines.most <= most
        await asyncio.sleep(100)
        assert states(models)[:3] == ["loaded", "unloaded", "unloaded"]
        assert all(not model.holders and model.transition is None for model in models.models)
        assert {model.number for model in models.models if model.state is State.LOADED} == engines.running
        models.close()

    run(scenario())
