"""A connection without a server: what it makes of bytes does not depend on how they come, nor on who else sends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from hypothesis import HealthCheck, given, settings, strategies as st

from bdh_batch.http.transport import site
from bdh_batch.http.transport.connection import Connection
from bdh_batch.http.transport.site import Site, Turns
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Limits

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

CRLF = b"\r\n"


class Transport:
    """What a connection asks of its transport; what is written stays here."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str) -> object:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else None

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """What is sent after that is none of a connection's business."""

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        """The test sends when it likes."""

    resume_reading = pause_reading


def content_of(number: int, size: int) -> bytes:
    return (b"%d:" % number + b"\r\n\r\nx" * size)[: size + 3]


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Some requests, as path and body each, and the bytes that they are."""
    reported, sent = [], b""
    for number in range(draw(st.integers(1, 5))):
        body = content_of(number, draw(st.sampled_from([0, 1, 7, 60, 3000]))) if draw(st.booleans()) else b""
        offer = b"connection: upgrade\r\nUpgrade: h2c\r\n" if draw(st.booleans()) else b""
        head = b"POST /%d HTTP/1.1\r\nhost: a\r\n%b" % (number, offer)
        sent += CRLF * draw(st.integers(0, 2)) + head
        if draw(st.booleans()):
            size = draw(st.integers(1, 50))
            chunks = [body[at : at + size] for at in range(0, len(body), size)]
            sent += b"transfer-encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks)
            sent += b"0\r\n" + draw(st.sampled_from([b"", b"x-trailer: y\r\n"])) + CRLF
        else:
            sent += b"content-length: %d\r\n\r\n%b" % (len(body), body)
        reported.append((b"/%d" % number, body))
    return reported, sent


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests(), st.lists(st.integers(1, 400), min_size=1, max_size=30), st.booleans())
def test_requests_are_the_same_however_their_bytes_come(
    made: tuple[list[tuple[bytes, bytes]], bytes], sizes: list[int], waits: bool
) -> None:
    reported, sent = made
    got: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message: Message = await receive()
            body, more = body + message["body"], message["more_body"]
        if waits:
            await asyncio.sleep(0)
        got.append((scope["raw_path"], body))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def run() -> Transport:
        site, transport = Site(app, Limits(), Metrics("m")), Transport()
        connection = Connection(site, lambda: None)
        connection.connection_made(cast(asyncio.Transport, transport))
        at, rest = 0, iter(sizes)
        while at < len(sent):
            size = next(rest, len(sent))
            connection.data_received(sent[at : at + size])
            at += size
            if size % 2:
                await asyncio.sleep(0)
        for _ in range(20 * (len(reported) + len(sent) // 1000)):
            await asyncio.sleep(0)
        assert connection.held == 0
        connection.connection_lost(None)
        return transport

    transport = asyncio.run(run())
    assert got == reported
    assert transport.written.count(b"HTTP/1.1 204 ") == len(reported)
    assert transport.written.count(b"HTTP/1.1 ") == len(reported)


async def test_turns_leave_room_for_others() -> None:
    """However many wait, what is new has its own turn after a few of theirs."""
    order: list[str] = []
    queue = Turns()
    for number in range(3 * site.ROUND_TURNS):
        queue.add(lambda number=number: order.append(f"waiting {number}"))  # type: ignore[misc]

    def new(rounds: int) -> None:
        order.append("new")
        if rounds:
            asyncio.get_running_loop().call_soon(new, rounds - 1)

    new(4)
    for _ in range(50 * site.ROUND_TURNS):
        await asyncio.sleep(0)
    waited = [each for each in order if each != "new"]
    assert waited == [f"waiting {number}" for number in range(3 * site.ROUND_TURNS)]
    rounds = " ".join(order).split("new")
    assert max(part.count("waiting") for part in rounds) <= site.ROUND_TURNS
    assert len([part for part in rounds if part.strip()]) >= 3


async def test_who_asks_again_goes_behind_all_that_wait() -> None:
    order: list[int] = []
    queue = Turns()

    def again() -> None:
        order.append(0)
        if len(order) < 10:
            queue.add(again)

    queue.add(again)
    queue.add(lambda: order.append(1))
    for _ in range(50):
        await asyncio.sleep(0)
    assert order == [0, 1, *[0] * 8]
