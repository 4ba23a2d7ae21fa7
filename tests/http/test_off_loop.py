"""Long work is done off the event loop: one piece at a time, tenants in turn, and no client that leaves holds it up."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.requests import ClientDisconnect, Request

from bdh_batch.errors import InvalidRequest, Unavailable
from bdh_batch.http import serving
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.gate import Gate
from bdh_batch.http.request import body as bodies
from bdh_batch.http.request.body import parse
from bdh_batch.http.request.client import Client
from bdh_batch.http.request.off_loop import LARGE, THREAD, OffLoop
from bdh_batch.http.request.strict import Wire
from bdh_batch.http.routes import Routes
from bdh_batch.http.schema.requests import CompletionBody
from bdh_batch.http.serving import Serving
from bdh_batch.observability.access import Account
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Limits, Settings

USER = {"role": "user", "content": "a"}


class TestOffTheLoop:
    async def test_one_at_a_time_and_tenants_in_turn(self) -> None:
        off_loop, order, running = OffLoop(), [], []

        def work(name: str) -> str:
            assert threading.current_thread().name == THREAD
            assert threading.current_thread().daemon
            running.append(name)
            assert running == [name]
            order.append(name)
            running.remove(name)
            return name

        names = ["a1", "a2", "a3", "a4", "b1", "c1", "b2"]
        results = await asyncio.gather(*(off_loop.run(name[0], partial(work, name)) for name in names))
        assert results == names
        assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]

    async def test_who_gives_up_is_not_waited_for(self) -> None:
        off_loop, go_on = OffLoop(), threading.Event()
        first = asyncio.create_task(off_loop.run("a", lambda: go_on.wait(300)))
        given_up = asyncio.create_task(off_loop.run("a", lambda: pytest.fail("it was given up")))
        next_one = asyncio.create_task(off_loop.run("b", lambda: 5))
        await asyncio.sleep(0)
        given_up.cancel()
        first.cancel()  # its work has begun, and nothing else begins until that ends
        await asyncio.sleep(0)
        assert not next_one.done()
        go_on.set()
        assert await next_one == 5
        assert await off_loop.run("a", lambda: 6) == 6

    async def test_a_client_that_leaves_at_its_start_lets_the_next_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        off_loop, go_on = OffLoop(), threading.Event()
        first = asyncio.create_task(off_loop.run("a", lambda: go_on.wait(300)))
        second = asyncio.create_task(off_loop.run("a", lambda: pytest.fail("it was given up")))
        third = asyncio.create_task(off_loop.run("a", lambda: 3))
        await asyncio.sleep(0)
        queue = off_loop._queue
        start_job = queue._start_next

        def start_job_too_late() -> None:
            monkeypatch.setattr(queue, "_start_next", start_job)
            start_job()
            second.cancel()

        monkeypatch.setattr(queue, "_start_next", start_job_too_late)
        go_on.set()
        assert await first
        assert await third == 3
        assert second.cancelled()
        assert await off_loop.run("a", lambda: 4) == 4

    async def test_a_client_that_has_left_takes_its_work_along(self) -> None:
        off_loop, go_on, gone = OffLoop(), threading.Event(), asyncio.Event()

        async def leaves() -> None:
            await gone.wait()

        client = Client("1", Caller("a"), {}, leaves=leaves)
        first = asyncio.create_task(off_loop.run("a", lambda: go_on.wait(300)))
        second = asyncio.create_task(
            off_loop.of("a", client).run(LARGE + 1, lambda: pytest.fail("its client has left"))
        )
        await asyncio.sleep(0)
        gone.set()
        with pytest.raises(ClientDisconnect):
            await second
        go_on.set()
        assert await first
        assert await off_loop.run("a", lambda: 4) == 4

    async def test_what_fails_fails_for_who_asked(self) -> None:
        off_loop = OffLoop()
        with pytest.raises(InvalidRequest):
            await off_loop.run("a", lambda: parse(b"{", CompletionBody, Limits()))
        assert await off_loop.run("a", lambda: 1) == 1

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [USER]}),
            ("/v1/embeddings", {"input": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ],
    )
    async def test_large_bodies_are_parsed_there(
        self, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
    ) -> None:
        threads: list[str] = []

        def watched(values: Any, kind: type[Wire], *rest: Any) -> Wire:
            threads.append(threading.current_thread().name)
            return bodies.check(values, kind, *rest)

        def watched_parse(raw: bytes, kind: type[Wire], *rest: Any) -> Wire:
            return watched(bodies.read_object(raw, rest[0]), kind, *rest)

        monkeypatch.setattr(serving, "check", watched)
        monkeypatch.setattr(serving, "parse", watched_parse)
        table = Routes(Serving.of(Settings(), Gate(), Metrics("tiny"))).table()
        endpoint = next(route.endpoint for route in table if route.path == path)
        for size, expected in ((LARGE, threading.main_thread().name), (LARGE + 1, THREAD)):
            raw = orjson.dumps(body).ljust(size)
            with pytest.raises(Unavailable):  # the gate is closed; the body was read
                await endpoint(_request(raw))
            assert threads.pop() == expected


def _request(raw: bytes) -> Request:
    parts = [{"type": "http.request", "body": raw}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await asyncio.Future()  # the client stays

    state: dict[str, Any] = {
        "id": "x",
        "caller": SimpleNamespace(label="a"),
        "standing": {},
        "span": None,
        "cleanup": ExitStack(),
        "account": Account(),
    }
    return Request({"type": "http", "headers": [], "state": state}, receive)
