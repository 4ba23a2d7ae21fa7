"""The benchmarks' client and their bytes, against servers that answer as they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bdh_batch.bench.outcome import Failed
from benchmarks.client import Choice, Client
from benchmarks.raw import CLOSED, LEFT, Ending, exchange, request, status_of

LOGPROBS = b'{"tokens":["a"],"token_logprobs":[-0.5]}'
TOKEN = (
    b"""data: {"choices":[{"index":0,"text":"a","logprobs":%b,"prompt_token_ids":[1,2],"token_ids":[7]}]}\n\n"""
    % LOGPROBS
)
REASON = b'data: {"choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n'
TOKENS = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
USAGE = (
    b'data: {"choices":[],"usage":%b}\n\n'
    % json.dumps({**TOKENS, "prompt_tokens_details": {"cached_tokens": 1}}).encode()
)
DONE = b"data: [DONE]\n\n"


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, *([b""] if end else [])))


def whole(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


@asynccontextmanager
async def answering(raw: bytes, close: bool = True) -> AsyncIterator[int]:
    """A server's port; it answers every request with the same bytes."""
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        await writer.drain()
        if not close:
            await over.wait()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        over.set()


async def test_a_stream_is_read_however_it_is_cut_and_comments_are_no_events() -> None:
    sent = b": keep-alive\n\n" + TOKEN + TOKEN.replace(b"[1,2]", b"[]") + REASON + USAGE + DONE
    for size in (1, 7, len(sent)):
        async with answering(chunked(*(sent[at : at + size] for at in range(0, len(sent), size)))) as port:
            found = await Client(f"http://127.0.0.1:{port}").ask(prompt="a")
        assert (found.tokens, found.prompt, found.cached_tokens) == ([7, 7], [1, 2], 1)
        assert (found.choices, found.usage) == ({0: Choice("aa", "stop", ["a", "a"], [-0.5, -0.5])}, TOKENS)
        assert len(found.times) == 2
        assert 0 < found.first <= found.times[-1] - found.sent


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (chunked(TOKEN), "status 200: "),
        (chunked(TOKEN, end=False), "status 200: the server closed the connection inside its response"),
        (whole("400 Bad Request", b'{"error":1}'), r"status 400: b'\{"),
        (b"", "status 0: the server closed the connection before it responded"),
    ],
)
async def test_a_response_that_is_not_whole_is_none(raw: bytes, error: str) -> None:
    async with answering(raw) as port:
        with pytest.raises(RuntimeError, match=error):
            await Client(f"http://127.0.0.1:{port}").ask(prompt="a")


async def test_a_client_that_leaves_has_what_came_until_then() -> None:
    async with answering(chunked(TOKEN, end=False), close=False) as port:
        stream = await Client(f"http://127.0.0.1:{port}").send(prompt="a")
        async with asyncio.timeout(300):
            while not stream.pieces:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        found = await stream.leave()
    assert found.tokens == [7]
    assert not found.complete


async def test_whole_responses_are_json_or_refusals() -> None:
    async with answering(whole("200 OK", b'{"a":[1]}')) as port:
        assert await Client(f"http://127.0.0.1:{port}", keep=False).post("/x", {}) == {"a": [1]}
    async with answering(whole("429 Too Many", b"{}")) as port:
        with pytest.raises(RuntimeError, match="status 429"):
            await Client(f"http://127.0.0.1:{port}").post("/x", {})
    async with answering(b"") as port:
        with pytest.raises(Failed):
            await Client(f"http://127.0.0.1:{port}").post("/x", {})


async def test_what_comes_of_bytes_is_how_the_connection_ended_and_the_status() -> None:
    async with answering(whole("403 Forbidden", b"")) as port:
        assert await exchange(port, request("GET", "/"), 60) == Ending(CLOSED, 403)
        assert await status_of(port, request("POST", "/", b"{}", length=100)) == 403
    async with answering(b"HTTP/1.1 200 OK\r\n", close=False) as port:
        found = await exchange(port, request("GET", "/"), 0.5)
        assert found.how == LEFT
        assert found.status in (0, 200)  # by how busy the machine is
        assert await status_of(port, request("GET", "/"), 0.5) == 0
    async with answering(b"") as port:
        assert await exchange(port, request("GET", "/"), 60) == Ending(CLOSED, 0)


def test_the_bytes_of_a_request_are_what_it_says() -> None:
    assert request("GET", "/") == b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    assert request("POST", "/a", b"{}", length=9).endswith(b"content-length: 9\r\n\r\n{}")
