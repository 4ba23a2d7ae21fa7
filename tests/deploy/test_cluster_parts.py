"""What a server on a cluster is made of, without a cluster."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh_batch.deploy.bounded_app import BoundedApp
from bdh_batch.deploy.checks import Share, check, check_room, fronts_on_any_node, share_of, with_threads
from bdh_batch.deploy.directory import MOST_BYTES, SILENT_SECONDS, Directory, Listed, Report
from bdh_batch.deploy.finder import ABSENT_SECONDS, Answer, Finder
from bdh_batch.deploy.scaling import CAPACITY, OUTSTANDING, desired_engines, engines_for
from bdh_batch.errors import ConfigError, Unavailable
from bdh_batch.processes.model_settings import models_of
from bdh_batch.settings import Settings, load


def listed(name: str, model: int = 0, fingerprint: str = "same") -> Listed:
    return Listed(name, model, "127.0.0.1", 1, "/nowhere/engine.step", fingerprint)


def of_engine(name: str, **facts: Any) -> Report:
    return Report(name, b"m", b"f", listed(name, **facts))


def settings(*options: str) -> Settings:
    return load(None, [cast(tuple[str, object], tuple(each.split("=", 1))) for each in options]).settings


async def test_the_directory_forgets_who_falls_silent_and_says_what_has_changed() -> None:
    now = 0.0
    directory = Directory(lambda: now)
    assert directory.report(of_engine("one")) is None
    assert directory.report(Report("front", b"x" * (MOST_BYTES + 1))) is None
    assert [each.name for each in directory.engines()] == ["one"]
    assert directory.metrics() == {"one": b"m", "front": b""}  # too long a page is none
    assert directory.figures() == {"one": b"f"}
    before = directory.version
    waiting = asyncio.create_task(directory.wait(before))
    await asyncio.sleep(0)
    assert not waiting.done()
    directory.report(of_engine("two", model=1, fingerprint="other"))  # of another model
    await waiting
    assert directory.version != before
    assert "not those of the engines" in str(directory.report(of_engine("three", fingerprint="other")))
    now = SILENT_SECONDS
    directory.report(of_engine("two", model=1, fingerprint="other"))
    now += 0.1
    assert [each.name for each in directory.engines()] == ["two"]
    assert directory.report(of_engine("three", fingerprint="other")) is None  # the others have gone
    directory.leave("three")
    directory.leave("three")
    assert [each.name for each in directory.engines()] == ["two"]
    assert Directory(lambda: now).version != Directory(lambda: now).version


async def test_a_drain_ends_when_all_front_ends_are_idle() -> None:
    directory = Directory(lambda: 0.0)
    directory.report(of_engine("one"))
    directory.report(Report("front", b""))
    directory.drain()
    assert directory.draining
    assert not directory.idle()
    directory.report(Report("front", b"", idle=True))
    assert directory.idle()


class Unreachable(Exception):
    """The directory cannot be asked."""


async def test_a_front_end_keeps_its_engines_while_the_directory_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers: asyncio.Queue[Answer | Exception] = asyncio.Queue()
    drained: list[bool] = []

    async def ask(version: str) -> Answer:
        asked.append(version)
        answer = await answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def said(answer: Answer | Exception) -> Sequence[str]:
        before = len(asked)
        answers.put_nowait(answer)
        while len(asked) == before:  # noqa: ASYNC110 - it waits for another task
            await asyncio.sleep(0)
        return sorted(finder.addresses(0))

    monkeypatch.setattr("bdh_batch.deploy.finder.RETRY_SECONDS", 0.0)
    finder = Finder(ask, (Unreachable,), lambda: drained.append(True))
    watching = asyncio.create_task(finder.watch())
    loop = asyncio.get_running_loop()
    try:
        assert await said(("1", False, [listed("one"), listed("two"), listed("other", model=1)])) == ["one", "two"]
        assert asked[-1] == "1"
        assert await said(Unreachable()) == ["one", "two"]
        assert asked[-1] == ""  # whatever the next directory has is new
        assert await said(("2", False, [listed("two")])) == ["one", "two"]  # it has only begun anew
        began = loop.time()
        monkeypatch.setattr(loop, "time", lambda: began + ABSENT_SECONDS)
        assert await said(("3", True, [listed("two")])) == ["two"]
        assert drained == [True]
        address = finder.addresses(0)["two"]
        assert str(address) == "two"
        assert address.in_step() is None  # its record is on another machine
    finally:
        monkeypatch.undo()
        watching.cancel()


class Stream:
    """A request to an application, and what it has responded."""

    def __init__(self, app: ASGIApp, method: str, path: str, body: bytes = b"") -> None:
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        self._received: list[Message] = [{"type": "http.request", "body": body}]
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        about = {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http", "http_version": "1.1"}
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers, **about}
        self.running = asyncio.ensure_future(app(scope, self._receive, self.sent.put))

    async def _receive(self) -> Message:
        return self._received.pop() if self._received else await asyncio.Future()


async def test_a_front_end_shows_its_engines_to_who_watches_until_it_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdh_batch.deploy.engine import NetworkEngine
    from bdh_batch.deploy.front import Front

    chosen, directory = settings("server.drain_seconds=0.1"), Directory(lambda: 0.0)
    (model,) = models_of(chosen)

    async def ask(version: str) -> Answer:
        await directory.wait(version)
        return directory.version, directory.draining, directory.engines()

    async def metrics() -> Mapping[str, bytes]:
        return directory.metrics()

    async def figures() -> Mapping[str, bytes]:
        return directory.figures()

    engine = await NetworkEngine.open(model, 0, "engine", "127.0.0.1", "secret")
    try:
        directory.report(Report("engine", engine.exposition(), engine.figures().dump(), engine.listed))
        front = await Front.open(chosen, "front", "secret", partial(Finder, ask, ()), metrics, figures)
        try:
            shown = await front._serving.metrics.watched.all_figures()
            assert shown["engine"].models["bdh-shakespeare"].levels["slots"] > 0
            assert {each.get_coro().__name__ for each in front._tasks} >= {"sample"}  # type: ignore[union-attr]
            long = b'{"prompt": "x", "max_tokens": 100000, "stream": true, "ignore_eos": true}'
            streams = [
                Stream(front.app, "GET", "/watch/stream"),
                Stream(front.app, "POST", "/v1/completions", long),
            ]
            for each in streams:
                assert (await asyncio.wait_for(each.sent.get(), 300))["status"] == 200
            directory.drain()
            for each in streams:
                await asyncio.wait_for(each.running, 300)
            assert any(b"shutting down" in streams[1].sent.get_nowait()["body"] for _ in range(streams[1].sent.qsize()))
            assert front.idle()
            assert front.problem() is None
            monkeypatch.setattr(Finder, "_take", lambda *_: 1 / 0)
            while front.problem() is None:
                directory.drain()
                await asyncio.sleep(0)
            assert "ZeroDivisionError" in str(front.problem())
        finally:
            await front.close()
    finally:
        await engine.close(0)


def test_engines_follow_the_load() -> None:
    assert [engines_for([load, 0], [6, 6]) for load in (0, 6, 7, 12, 13, 60)] == [0, 1, 2, 2, 3, 10]
    assert engines_for([], []) == 0
    starting: Any = SimpleNamespace(target_num_replicas=2, aggregated_metrics={})
    assert desired_engines(starting) == (2, {})
    busy: Any = SimpleNamespace(
        target_num_replicas=1, aggregated_metrics={OUTSTANDING: {"a": 9.0}, CAPACITY: {"a": 3.0}}
    )
    assert desired_engines(busy) == (3, {})


def test_an_engine_gets_its_share() -> None:
    (model,) = models_of(settings("engine.replicas=2", "engine.threads=3", "ray.max_replicas=5"))
    assert share_of(model, 1) == Share(2, 5, 3, 0.0)
    (model,) = models_of(settings("model.device=cuda"))
    assert share_of(model, 1) == Share(1, 1, 1, 1.0)
    (model,) = models_of(settings("ray.gpus_per_engine=0.25"))
    assert share_of(model, 1).gpus == 0.25
    assert with_threads(model, 7).settings.engine.threads == 7


def test_a_cluster_without_room_is_refused() -> None:
    two = [{"CPU": 5.0}, {"CPU": 3.0}]
    assert check_room({"m": Share(3, 3, 2, 0.0)}, two) == []
    assert check_room({"m": Share(1, 1, 3, 0.0), "n": Share(1, 1, 5, 0.0)}, two) == []
    assert check_room({"m": Share(1, 9, 2, 0.0)}, two) == [
        "ray.max_replicas: the cluster's nodes have room for 3 of 9 engines"
    ]
    for share, reason in (
        (Share(4, 4, 2, 0.0), "engine.replicas: the cluster's nodes have room for 3 of 4 engines"),  # one CPU on each
        (Share(1, 1, 6, 0.0), "engine.threads: an engine of m takes 6 CPU, and no node has more than 5"),
        (Share(1, 1, 1, 1.0), "ray.gpus_per_engine: an engine of m takes 1 GPU, and no node has more than 0"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_room({"m": share}, two)
        assert str(refused.value) == reason


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["server.uds=/run/x"], "server.uds"),
        (["server.pid_file=/run/x"], "server.pid_file"),
        (["kserve.grpc_port=1"], "kserve.grpc_port"),
        (["scheduler.trace_file=/run/x"], "scheduler.trace_file"),
        (["server.workers=2"], "store.path"),
        (["server.workers=2", "store.path=/x", "rate_limiting.enabled=true"], "rate_limiting.storage"),
        (["engine.devices=[cpu]"], "engine.devices"),
        (["engine.replicas=3", "ray.max_replicas=2"], "ray.max_replicas"),
        (['models=[{"id": "a", "load": "on_demand"}]'], "models (a): load"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_cannot_work_on_a_cluster_is_refused(options: list[str], named: str) -> None:
    chosen = settings(*options)
    with pytest.raises(ConfigError) as refused:
        check(chosen, models_of(chosen))
    assert str(refused.value).startswith(f"{named}:")


def test_front_ends_are_where_what_they_store_is() -> None:
    shared = ("store.url=postgresql://db/x", "store.states_url=s3://bucket")
    for options, anywhere in [((), False), (shared, False), ((*shared, "store.path=/x"), True)]:
        chosen = settings("server.workers=2" if options else "server.workers=1", *options)
        check(chosen, models_of(chosen))
        assert fronts_on_any_node(chosen.store) == anywhere


@pytest.mark.parametrize("address", ["ray://host:1", "host", "host:port", "http://host:1"])
def test_a_cluster_is_named_by_its_head_node(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^ray\.address"):
        settings(f"ray.address={address}")


async def test_bodies_are_bounded_together() -> None:
    finished = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        await finished.wait()
        await PlainTextResponse(str(len(body)))(scope, receive, send)

    bounded, sent = BoundedApp(app, most=10), list[Message]()

    async def request(size: int) -> None:
        body: Message = {"type": "http.request", "body": b"x" * size, "more_body": False}

        async def receive() -> Message:
            return body

        async def send(message: Message) -> None:
            sent.append(message)

        await bounded({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)

    first = asyncio.create_task(request(8))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match=r"limits\.max_buffered_bytes"):
        await request(3)
    assert bounded.held == 8
    finished.set()
    await first
    await request(3)
    assert bounded.held == 0
    assert [message["body"] for message in sent if "body" in message] == [b"8", b"3"]


async def test_the_application_responds_to_a_lifespan() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    said: list[str] = []

    async def receive() -> Message:
        return {"type": "lifespan"}

    async def send(message: Message) -> None:
        said.append(message["type"])

    await BoundedApp(app, 1)({"type": "lifespan"}, receive, send)
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_the_command_says_that_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdh_batch.deploy import commands

    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'bdh-batch\[ray\]'"):
        commands.up(Settings(), lambda url, names: None)


def test_a_store_that_is_not_on_the_node_is_named(tmp_path: Path) -> None:
    from bdh_batch.deploy.engine import NetworkEngine

    (model,) = models_of(settings(f"store.path={tmp_path / 'gone'}"))
    with pytest.raises(
        ConfigError, match=rf"^on the node 127\.0\.0\.1 \(.*\): store\.path: {tmp_path}/gone is not there"
    ):
        asyncio.run(NetworkEngine.open(model, 0, "engine", "127.0.0.1", "secret"))
    (model,) = models_of(Settings())
    chosen = model.settings.model.model_copy(update={"path": tmp_path / "no-model"})
    model = replace(model, settings=model.settings.model_copy(update={"model": chosen}))
    with pytest.raises(ConfigError, match=r"^on the node 127\.0\.0\.1 .*no-model"):
        asyncio.run(NetworkEngine.open(model, 0, "engine", "127.0.0.1", "secret"))
