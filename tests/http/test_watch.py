"""What operators watch: samples of the last minutes, as they come, and the scheduler's steps."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from bdh_batch.errors import Unavailable
from bdh_batch.http.auth.access import Admission
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.auth.keys import Key, KeyFile, new_key
from bdh_batch.http.errors import RateLimited
from bdh_batch.http.watch import details, feed as feeds
from bdh_batch.http.watch.details import tenants
from bdh_batch.http.watch.feed import Feed
from bdh_batch.http.watch.response_types import RecordedSteps, WatchHistory
from bdh_batch.observability.figures import Figures, ModelFigures, TenantFigures
from bdh_batch.observability.samples import Comparing, quantile
from tests.conftest import HANG_SECONDS, eventually

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
Event = tuple[str, Any]
HISTORY, STREAM, STEPS = "/watch/history", "/watch/stream", "/watch/steps"
LONG = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def operator(file: KeyFile) -> str:
    return file.add(lambda sha256: new_key(sha256, "boss", {"operator": True}))


@pytest.fixture(scope="module")
def user(file: KeyFile) -> str:
    return file.add(lambda sha256: new_key(sha256, "user", {"tokens_per_minute": 10_000_000}))


@pytest.fixture(scope="module")
def guarded(serve: ServeFactory, file: KeyFile, operator: str, user: str) -> Iterator[Server]:
    """Two sequences run at a time, for those with keys."""
    options = ("auth.enabled=true", f"auth.api_keys_file={file.path}", "scheduler.max_running=2")
    with serve(*options, model=TINY) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@asynccontextmanager
async def busy(client: httpx.AsyncClient, key: str) -> AsyncIterator[None]:
    """Meanwhile two streams run, and one waits."""

    async def read(number: int) -> None:
        headers = bearer(key) | {"x-request-id": f"long-{number}"}
        while True:  # again, should the test take longer
            async with client.stream("POST", "/v1/completions", json=LONG, headers=headers) as response:
                async for _ in response.aiter_bytes():
                    pass

    streams = [asyncio.create_task(read(number)) for number in range(3)]
    try:
        yield
        assert not any(stream.done() for stream in streams)
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


@asynccontextmanager
async def watching(client: httpx.AsyncClient, key: str, since: float = 0) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a stream: their names, and what they have."""

    async def events(response: httpx.Response) -> AsyncIterator[Event]:
        name = ""
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))

    async with client.stream("GET", STREAM, params={"since": since}, headers=bearer(key)) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        yield events(response)


async def until(events: AsyncIterator[Event], kind: str, condition: Callable[[Any], bool]) -> Any:
    """The first event of that kind of which `condition` holds."""
    async for name, value in events:
        if name == kind and condition(value):
            return value
    raise AssertionError("the stream has ended")


class TestServer:
    def test_shows_who_runs_who_waits_and_why(self, guarded: Server, operator: str, user: str, file: KeyFile) -> None:
        label = next(key.id for key in file.read() if key.name == "user")

        async def look(client: httpx.AsyncClient) -> None:
            async with busy(client, user), watching(client, operator) as events:
                sample = await until(events, "sample", lambda each: (each["running"], each["waiting"]) == (2, 1))
                assert sample["slots"] == 2
                sample = await until(events, "sample", lambda each: each["generated"] > 0)
                assert sample["models"]["tiny"]["generated"] == sample["generated"]
                assert 0 < sample["occupancy"] <= 2
                assert sample["between_tokens"] == sorted(sample["between_tokens"])
                details = await until(events, "details", lambda each: each["tenants"][0]["waiting"] == 1)
                assert [model["state"] for model in details["models"]] == ["loaded"]
                first, second = details["tenants"]
                assert (first["tenant"], first["key"]["name"], second["key"]["name"]) == (label, "user", "boss")
                assert first["limits"]["tokens_per_minute"]["limit"] == 10_000_000
                assert first["limits"]["tokens_per_minute"]["remaining"] < 10_000_000

                given: dict[str, str | int] = {"steps": 3, "seconds": 10, "model": "tiny"}
                response = await client.get(STEPS, params=given, headers=bearer(operator))
                assert response.status_code == 200, response.text
                (engine,) = RecordedSteps.model_validate_json(response.content).engines
                numbers = [step.step for step in engine.steps]
                assert numbers == [*range(numbers[0], numbers[0] + 3)]
                for step in engine.steps:
                    assert {each.request for each in step.sequences} < {"long-0", "long-1", "long-2"}
                    assert [(each.tokens, each.phase, each.tenant) for each in step.sequences] == [
                        (1, "decode", label)
                    ] * 2
                    assert [(each.reason, each.generated) for each in step.waiting] == [("max_running", 0)]
                    assert step.waiting_total == 1
                assert user not in response.text
                history = (await client.get(HISTORY, headers=bearer(user))).content
                assert WatchHistory.model_validate_json(history).samples[-1].running == 2
                assert label.encode() not in history

        asyncio.run(with_client(guarded, look))

    def test_lets_only_keys_watch_and_only_operators_see_tenants(
        self, guarded: Server, file: KeyFile, operator: str
    ) -> None:
        """A key that is revoked meanwhile watches no longer."""
        assert [guarded.http.get(path).status_code for path in (HISTORY, STREAM, STEPS)] == [401] * 3
        key = file.add(lambda sha256: new_key(sha256, "passing", {}))
        eventually(lambda: guarded.http.get(HISTORY, headers=bearer(key)).status_code == 200)

        async def look(client: httpx.AsyncClient) -> None:
            response = await client.get(STEPS, headers=bearer(key))
            assert guarded.error(response, 403)["message"] == "This API key is not an operator's."
            async with watching(client, key) as events:
                await until(events, "sample", lambda each: True)
                file.revoke("passing")
                names = {name async for name, _ in events}  # to its end
            assert names <= {"sample"}
            assert (await client.get(HISTORY, headers=bearer(key))).status_code == 401

        asyncio.run(with_client(guarded, look))

    def test_goes_on_where_a_page_has_lost_it(self, guarded: Server, operator: str) -> None:
        async def look(client: httpx.AsyncClient) -> None:
            async with watching(client, operator) as events:
                first = await until(events, "sample", lambda each: True)
            async with watching(client, operator, since=first["time"]) as events:
                assert (await until(events, "sample", lambda each: True))["time"] > first["time"]

        asyncio.run(with_client(guarded, look))

    @pytest.mark.parametrize(
        ("path", "param"),
        [
            *((f"{STEPS}?steps={bad}", "steps") for bad in ("0", "201", "1.5", "a", "nan")),
            *((f"{STEPS}?seconds={bad}", "seconds") for bad in ("-1", "11", "inf")),
            *((f"{STREAM}?since={bad}", "since") for bad in ("-1", "x")),
            *((f"{path}?spare=1", "spare") for path in (HISTORY, STREAM, STEPS)),
        ],
    )
    def test_names_what_it_does_not_understand(self, guarded: Server, operator: str, path: str, param: str) -> None:
        assert guarded.error(guarded.http.get(path, headers=bearer(operator)), 400)["param"] == param

    def test_ends_its_streams_when_it_drains(self, guarded: Server, operator: str) -> None:
        """The last test of this server."""

        async def look(client: httpx.AsyncClient) -> None:
            async with watching(client, operator) as events:
                await until(events, "details", lambda each: each["status"] == "ready")
                guarded.terminate()
                assert {name async for name, _ in events} <= {"sample", "details"}  # to its end

        asyncio.run(with_client(guarded, look))
        assert guarded.exit_code() == 0


async def with_client(server: Server, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS) as client:
        await work(client)


class TestFeed:
    def test_drops_what_a_watcher_does_not_take(self) -> None:
        async def look() -> None:
            feed = Feed()
            for time in range(feeds.LENGTH + 5):
                feed.add(time, {"time": time})
            assert len(feed) == feeds.LENGTH
            with feed.watch("a", since=feeds.LENGTH + 3) as slow, feed.watch("b", since=math.inf) as quick:
                assert await slow.take() == b'event: sample\ndata: {"time":454}\n\n'
                for time in range(20):
                    feed.add(1000 + time, {"time": 1000 + time})
                    assert (await quick.take()).count(b"event: sample") == 1
                assert (await slow.take()).count(b"event: sample") == feeds.HELD
                feed.show({})  # neither is an operator's
                feed.add(2000, {})
                assert b"details" not in await quick.take()

        asyncio.run(look())

    def test_has_room_for_some_and_none_once_it_is_closed(self) -> None:
        async def look() -> None:
            feed = Feed()
            with ExitStack() as open:
                for number in range(feeds.WATCHERS):
                    last = open.enter_context(feed.watch(str(number // feeds.WATCHERS_EACH), 0))
                    if number == feeds.WATCHERS_EACH - 1:
                        with pytest.raises(RateLimited):
                            open.enter_context(feed.watch("0", 0))
                with pytest.raises(RateLimited):
                    open.enter_context(feed.watch("another", 0))
                open.enter_context(feed.watch("operator", 0, is_operator=True))
                feed.close()
                await last.take()
                assert last.closed
            with pytest.raises(Unavailable), feed.watch("0", 0):
                pass

        asyncio.run(look())


class TestDetails:
    def test_says_nothing_of_what_a_key_has_used_that_no_process_reports(self) -> None:
        class Keys:
            def known_keys(self) -> dict[str, Key]:
                return {key.id: key for key in (Key(sha256=f"{number:064x}"[::-1]) for number in range(100))}

            async def remaining(self, caller: Caller) -> dict[str, dict[str, int]]:
                return {}

        feed = Feed()
        feed.tenants = {"busy": TenantFigures(0, 1, 2, 3)}
        busy, idle, *others = asyncio.run(tenants(cast(Admission, Keys()), feed))
        assert len(others) == details.MOST - 2
        assert [busy[name] for name in ("tenant", "waiting", "requests")] == ["busy", 0, 1]
        assert [idle[name] for name in ("tenant", "waiting", "requests")] == ["0" * 16, None, None]


class TestSamples:
    def test_say_what_has_changed_also_of_processes_that_come_and_go(self) -> None:
        def counted(started: float, tokens: float, running: int) -> Figures:
            counts = {"generated": tokens, "rejections.queue_full": tokens / 10}
            buckets = {"0.1": tokens / 2, "0.2": tokens, "+Inf": tokens}
            return Figures(started, {"m": ModelFigures(counts, {"running": running}, {"first_token": buckets})})

        comparing = Comparing()
        assert comparing.sample(100, {"a": counted(50, 1000, 1)}) is None
        found = comparing.sample(110, {"a": counted(50, 1100, 2), "b": counted(105, 20, 1), "c": counted(50, 9999, 1)})
        assert found is not None
        assert (found["generated"], found["running"], found["rejections"]) == (12.0, 4, {"queue_full": 12})
        assert found["first_token"] == pytest.approx([0.1, 0.19, 0.198])
        found = comparing.sample(120, {"a": counted(111, 10, 0)})  # another process of that name
        assert found is not None
        assert (found["generated"], found["running"]) == (1.0, 0)
        found = comparing.sample(130, {"a": counted(111, 10, 0)})
        assert found is not None
        assert (found["generated"], found["first_token"], found["rejections"]) == (0.0, None, {})

    def test_quantiles_are_those_of_prometheus(self) -> None:
        assert quantile({1.0: 0, 2.0: 50, 4.0: 100, math.inf: 100}, 0.75) == 3.0
        assert quantile({1.0: 0, math.inf: 10}, 0.5) == 1.0
        assert quantile({1.0: 0, math.inf: 0}, 0.5) is None
        assert quantile({}, 0.5) is None

    def test_figures_come_through_a_socket_as_they_were(self) -> None:
        figures = Figures(1.5, {"m": ModelFigures({"a": 1}, {"b": 2}, {"c": {"+Inf": 3}})}, {"t": TenantFigures(1)})
        assert Figures.load(figures.dump()) == figures
