"""What clients may hold of the server: connections, bytes, and its patience. None of it is without a bound."""

from __future__ import annotations

import asyncio
import gzip
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import httpx
import pytest

from bdh_batch.errors import BDHError, Unavailable
from bdh_batch.http.errors import TooManyConnections
from bdh_batch.http.request.off_loop import OffLoop
from bdh_batch.http.responses.generation import EventStream
from bdh_batch.http.transport.accept import Acceptor
from bdh_batch.http.transport.budgets import (
    RESERVED_DESCRIPTORS,
    BufferBudget,
    ConnectionBudget,
    connections_within_descriptors,
)
from bdh_batch.http.transport.connection import AHEAD_BYTES
from bdh_batch.http.transport.site import Site
from bdh_batch.messages import Delta
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Limits
from tests.conftest import eventually
from tests.http.raw import Raw, ask, get, post

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from bdh_batch.backends.base import Generation
    from bdh_batch.http.responses.frames import Frames
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
MIB = 2**20
BUFFERED = 2 * MIB
CONNECTIONS, EACH = 60, 40
KEEPALIVE = 0.2
ENDLESS = {"prompt": "a", "max_tokens": 100_000, "stream": True}
RECEIVED_AT_ONCE = 256 * 1024  # by the event loop


@pytest.fixture(scope="module")
def tight(serve: ServeFactory) -> Iterator[Server]:
    """Runs one sequence at a time, and has little room for anything."""
    options = (
        *("scheduler.max_running=1", f"server.sse_keepalive_seconds={KEEPALIVE}", "limits.write_seconds=2"),
        *(f"limits.max_connections={CONNECTIONS}", f"limits.max_connections_per_address={EACH}"),
        f"limits.max_buffered_bytes={BUFFERED}",
    )
    with serve(*options, model=TINY) as server:
        yield server


def resident(server: Server) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


class TestPipelining:
    def test_a_flood_behind_a_stream_is_not_read_and_holds_nobody_up(self, tight: Server) -> None:
        before = resident(tight)
        floods = [Raw(tight, post(ENDLESS)) for _ in range(10)]
        for flood in floods:
            flood.socket.setblocking(False)
            sent, content = 0, get("/") * 800_000
            while sent < len(content):
                try:
                    sent += flood.socket.send(content[sent:])
                except (BlockingIOError, ConnectionError):  # or it has been cut off, as it reads nothing
                    break
            assert sent < len(content)  # the server has stopped reading
        held = tight.metrics()["bdh_http_buffered_bytes"]
        assert held <= len(floods) * (AHEAD_BYTES + RECEIVED_AT_ONCE)
        assert resident(tight) - before < 64 * MIB
        for flood in floods:
            flood.close()
        tight.until_idle()
        tight.until(lambda m: m["bdh_http_buffered_bytes"] < 1000)

    def test_requests_are_answered_in_their_order_however_many_come_at_once(self, tiny: Server) -> None:
        number = 3000
        client = Raw(tiny)
        for at in range(number):
            client.socket.sendall(get(f"/v1/models/{at}"))
            if at % 500 == 0:  # others have their turns between them
                assert ask(tiny, get()).status == 200
        found = [client.response() for _ in range(number)]
        assert [int(response.error["message"].split("'")[1]) for response in found] == list(range(number))
        client.close()


class TestConnections:
    def test_are_bounded_for_each_address_and_in_all(self, tight: Server) -> None:
        tight.http.close()  # its connections would count
        elsewhere = httpx.HTTPTransport(local_address="127.0.0.4")
        tight.http = httpx.Client(base_url=tight.url, transport=elsewhere, timeout=300)  # and looks on
        tight.until(lambda m: m["bdh_http_connections"] == 1)
        first = [connect(tight, "127.0.0.1") for _ in range(EACH)]
        responses = [read(connect(tight, "127.0.0.1")) for _ in range(2)]
        assert all(response.startswith(b"HTTP/1.1 429 ") for response in responses)
        assert all(b"limits.max_connections_per_address" in response for response in responses)
        assert all(b"retry-after: " in response for response in responses)
        second = [connect(tight, "127.0.0.2") for _ in range(CONNECTIONS - EACH - 1)]
        response = read(connect(tight, "127.0.0.3"))
        assert response.startswith(b"HTTP/1.1 503 ")
        assert b"limits.max_connections" in response
        for client in (*first, *second):
            client.close()
        tight.until(lambda m: m["bdh_http_connections"] == 1)
        metrics = tight.metrics()
        assert metrics["bdh_admission_rejections_total{reason=connections}"] >= 1
        assert metrics["bdh_admission_rejections_total{reason=connections_per_address}"] >= 2
        assert "ulimit -n" in tight.log

    def test_of_a_network_count_together_and_those_of_proxies_do_not(self) -> None:
        limits = Limits(max_connections=10, max_connections_per_address=2)
        budget = ConnectionBudget(limits, ["10.0.0.0/8", "unix"], Metrics("m"))
        leave = budget.enter("2001:db8::1")
        budget.enter("2001:db8::ffff:2")
        with pytest.raises(TooManyConnections):
            budget.enter("2001:db8::3")
        leave()
        budget.enter("2001:db8::3")
        budget.enter("::ffff:1.2.3.4")
        budget.enter("1.2.3.4")
        with pytest.raises(TooManyConnections):
            budget.enter("1.2.3.4")
        for address in ("10.1.2.3", "::ffff:10.1.2.3", "10.1.2.3", "", "", ""):
            budget.enter(address)
        with pytest.raises(Unavailable):
            budget.enter("")


class TestBodies:
    def test_that_are_held_open_give_way_to_small_ones(self, tight: Server) -> None:
        part = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 900000\r\n\r\n" + b" " * 500_000
        holders = [Raw(tight, part) for _ in range(8)]
        eventually(lambda: sum(peek(holder) != b"" for holder in holders) >= 4)
        assert tight.text(prompt="a", max_tokens=1) is not None
        assert tight.metrics()["bdh_http_buffered_bytes"] <= BUFFERED
        eventually(lambda: sum(peek(holder) != b"" for holder in holders) >= 4)  # when the server has read them
        refused = [holder.response() for holder in holders if peek(holder) != b""]
        assert len(refused) < 8
        for response in refused:
            assert (response.status, response.error["code"]) == (503, "service_unavailable")
            assert "limits.max_buffered_bytes" in response.error["message"]
            assert int(response.headers["retry-after"]) >= 1
        for holder in holders:
            holder.close()
        tight.until(lambda m: m["bdh_http_buffered_bytes"] < 1000)
        assert tight.metrics()["bdh_admission_rejections_total{reason=buffered_bytes}"] >= 4

    def test_count_as_what_they_become(self, tight: Server) -> None:
        content = gzip.compress(b'{"prompt": "a"' + b" " * (3 * MIB) + b"}")
        response = tight.http.post("/v1/completions", content=content, headers={"content-encoding": "gzip"})
        assert "limits.max_buffered_bytes" in tight.error(response, 503)["message"]

    def test_the_largest_that_is_not_whole_goes_first(self) -> None:
        holders: list[Held] = []
        budget = BufferBudget(100, holders, Metrics("m"))
        holders += [Held(sheddable, budget) for sheddable in (False, True, True)]
        for holder, size in zip(holders, (60, 30, 10), strict=True):
            budget.update(holder, size)
        newcomer = Held(True, budget)
        budget.update(newcomer, 5)
        assert [holder.error is not None for holder in (*holders, newcomer)] == [False, True, False, False]


class Held:
    def __init__(self, sheddable: bool, budget: BufferBudget) -> None:
        self.held = 0
        self._budget = budget
        self.sheddable = sheddable
        self.error: BDHError | None = None

    def shed(self, error: Unavailable) -> None:
        self.error = error
        self._budget.update(self, 0)


class TestPatience:
    def test_a_client_that_takes_nothing_is_cut_off(self, tight: Server) -> None:
        pile = get("/openapi.json") * 200  # some 20 MB: more than all buffers on the way hold
        flood = socket.socket()
        flood.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flood.connect(("127.0.0.1", tight.port))
        flood.sendall(pile)
        assert flood.recv(1) == b"H"  # the server is at it
        tight.until(lambda m: m["bdh_http_connections"] == 1)
        flood.close()

    def test_a_stream_that_waits_is_kept_alive_by_comments(self, tight: Server) -> None:
        holder = Raw(tight, post(ENDLESS | {"stream": False}))  # which needs no reader meanwhile
        tight.until(lambda m: m["bdh_num_requests_running"] == 1)
        waiting = tight.raw({"prompt": "a", "max_tokens": 2, "stream": True})
        waiting.read_until(b": keep-alive\n\n")
        waiting.read_until(b": keep-alive\n\n\r\n" + b"e\r\n: keep-alive\n\n")
        assert waiting.status == 200
        assert b"x-accel-buffering: no\r\n" in waiting.received
        assert b"data:" not in waiting.received
        with tight.openai() as client:
            stream = client.completions.create(model="tiny", prompt="a", max_tokens=2, stream=True)
            holder.close()
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert waiting.read_all().count(b"data: [DONE]") == 1
        waiting.close()

    async def test_an_error_after_a_comment_is_an_event_and_before_it_a_status(self) -> None:
        for keepalive, sent in ((0.001, True), (60.0, False), (0.0, False)):
            messages: list[Message] = []
            generation = cast("Generation", failing := Failing())

            async def send(message: Message, messages: list[Message] = messages, failing: Failing = failing) -> None:
                messages.append(message)
                failing.now.set()  # once a comment has been sent

            if not sent:
                failing.now.set()
            stream = EventStream(generation, cast("Frames", Silent()), OffLoop().of("a"), keepalive=keepalive)
            try:
                await stream({"type": "http"}, forever, send)
            except Unavailable:
                assert not sent
            bodies = [message["body"] for message in messages[1:]]
            assert bool(bodies) == sent
            if sent:
                assert bodies[0] == b": keep-alive\n\n"
                assert bodies[-1].startswith(b'data: {"error":')


class Failing:
    """A generation that fails when it is told to, and says nothing before."""

    prompts: tuple[tuple[int, ...], ...] = ((1,),)
    cached_tokens = (0,)

    def __init__(self) -> None:
        self.now = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        await self.now.wait()
        yield [(0, Delta(error=Unavailable("no", 1)))]

    def abort(self) -> None:
        """There is nothing to end."""


class Silent:
    """Frames that say nothing."""

    continuous_usage, only_text = False, True

    def opening(self, prompts: object) -> bytes:
        return b""

    def with_warnings(self, pieces: list[bytes]) -> list[bytes]:
        return pieces

    keepalive = b": keep-alive\n\n"

    def named(self, error: BDHError) -> BDHError:
        return error

    def failed(self, error: BDHError) -> bytes:
        return b'data: {"error":' + repr(error.message).encode() + b"}\n\n"


async def forever() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


class TestDescriptors:
    def test_are_raised_to_what_connections_need(self, caplog: pytest.LogCaptureFixture) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (RESERVED_DESCRIPTORS + 50, hard))
            assert connections_within_descriptors(100) == 100
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == RESERVED_DESCRIPTORS + 100
            assert not caplog.records
            if hard != resource.RLIM_INFINITY:
                assert connections_within_descriptors(2 * hard) == hard - RESERVED_DESCRIPTORS
                assert "limits.max_connections" in caplog.text
                assert "ulimit -n" in caplog.text
                caplog.clear()
                assert connections_within_descriptors(None) <= hard - RESERVED_DESCRIPTORS
                assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    async def test_that_run_out_are_reported_once_and_connections_wait(self, caplog: pytest.LogCaptureFixture) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        metrics = Metrics("m")
        site = Site(response, Limits(), metrics)
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
            listener.setblocking(False)
            budget = ConnectionBudget(Limits(max_connections=10), [], metrics)
            acceptor = Acceptor(listener, site, budget, None)
            os.close(free := os.dup(client.fileno()))
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
                client.connect(listener.getsockname())
                acceptor._accept()  # what the event loop does when somebody waits there
                assert "no connection can be taken" in caplog.text
                acceptor._accept()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, get("/health", "connection: close"))
            assert (await loop.sock_recv(client, 1000)).startswith(b"HTTP/1.1 204 ")
            acceptor.close()
            await site.empty.wait()
        assert caplog.text.count("no connection can be taken") == 1
        assert "ulimit -n" in caplog.text


async def response(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def connect(server: Server, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=300, source_address=(address, 0))


def read(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read()


def peek(client: Raw) -> bytes:
    """What has come, if anything."""
    client.socket.setblocking(False)
    try:
        return client.socket.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    finally:
        client.socket.settimeout(300)
