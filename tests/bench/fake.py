"""A server that does what a prompt tells it to: right responses, and every way to answer wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

SLOW = 0.1  # seconds
SSE = "text/event-stream; charset=utf-8"


def event(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def text(piece: str, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": None, **more}])


DONE = b"data: [DONE]\n\n"
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
GOOD = [b": ping\n\n", text("a"), text("b"), text("c", finish_reason="stop"), USAGE, DONE]

# What a prompt asks for: the kind that has to be counted, and the stream that is answered.
STREAMS: Mapping[str, tuple[str, Sequence[bytes]]] = {
    "good": ("", GOOD),
    "cut in odd places": ("", [bytes([byte]) for byte in b"".join(GOOD).replace(b"\n", b"\r\n")]),
    "ends early": ("closed_mid_stream", GOOD[:-1]),
    "last event unfinished": ("closed_mid_stream", [*GOOD[:-1], b"data: [DONE]\n"]),
    "error": ("error_event", [*GOOD[:2], event(error={"message": "out of\nluck", "type": "internal_error"})]),
    "named error": ("error_event", [*GOOD[:2], b"event: error\n" + event(message="out of luck"), DONE]),
    "named error, no JSON": ("error_event", [*GOOD[:2], b"event: error\ndata: out of luck\n\n", DONE]),
    "flat error": ("error_event", [*GOOD[:2], event(object="error", message="out of luck"), *GOOD[2:]]),
    "bare error": ("error_event", [event(error="out of luck")]),
    "no tokens": ("no_tokens", [event(choices=[{"text": "", "finish_reason": "stop"}]), DONE]),
    "no JSON": ("malformed_sse", [*GOOD[:2], b"data: {'a'}\n\n"]),
    "no UTF-8": ("malformed_sse", [b'data: {"choices":[{"text":"\xff"}]}\n\n', DONE]),
    "no object": ("malformed_sse", [b"data: [1]\n\n", DONE]),
    "no field": ("malformed_sse", [b"Traceback (most recent call last)\n\n", DONE]),
    "no choices": ("malformed_sse", [event(choices=[3]), DONE]),
    "after the end": ("malformed_sse", [*GOOD, text("d")]),
}
STATUSES = {"status 500": 500, "status 429": 429, "status 503": 503}
OTHERS = {
    "hangs up at once": "closed_before_answer",
    "hangs up inside": "closed_mid_stream",
    "hangs up in the headers": "closed_mid_stream",
    "hangs up after a hint": "closed_mid_stream",
    "no HTTP": "malformed_http",
    "no stream": "malformed_sse",
}
EXPECTED = {
    **{prompt: kind for prompt, (kind, _) in STREAMS.items()},
    **{prompt: f"http_{status}" for prompt, status in STATUSES.items()},
    **OTHERS,
}


class Fake:
    """One server; remembers the bodies and headers of its requests, and how many were under way at once."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.heads: list[str] = []  # as they came
        self.most = self.running = 0
        self.closes = False  # a kept connection, without a word, after each response
        self.held = asyncio.Event()  # "held" is answered when this is set
        self.wanted = 0  # it is, as soon as so many are under way
        self._tasks: set[asyncio.Task[None] | None] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Its port, until the block's end."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]
        self.held.set()
        await asyncio.gather(*(task for task in self._tasks if task is not None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                fields = (line.split(": ", 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in fields}
                content = await reader.readexactly(int(headers["content-length"]))
                if "completions" not in head[0]:
                    writer.write(whole(404, b'{"detail":"Not Found"}'))
                    continue
                self.bodies.append(json.loads(content))
                self.headers.append(headers)
                self.heads.append("\r\n".join(head))
                self.running += 1
                self.most = max(self.most, self.running)
                if self.running == self.wanted:
                    self.held.set()
                try:
                    await self._answer(str(self.bodies[-1].get("prompt")), writer)
                finally:
                    self.running -= 1
                if self.closes:
                    break
        writer.close()

    async def _answer(self, prompt: str, writer: asyncio.StreamWriter) -> None:
        if prompt == "held":
            await self.held.wait()
        if prompt == "slow":
            await asyncio.sleep(SLOW)
        if prompt in STATUSES:
            writer.write(whole(STATUSES[prompt], b'{"error": {"message": "no luck"}}'))
        elif prompt == "no stream":
            writer.write(whole(200, b"{}"))
        elif prompt == "no HTTP":
            writer.write(b"220 mail.example ready\r\n\r\n")
        elif prompt == "hangs up at once":
            writer.transport.abort()
        elif prompt == "hangs up in the headers":
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\n".encode())
            writer.close()
        elif prompt == "hangs up after a hint":
            writer.write(b"HTTP/1.1 103 Early Hints\r\ncontent-type: text/plain\r\n\r\n")
            writer.close()
        else:
            await self._stream(prompt, writer)

    async def _stream(self, prompt: str, writer: asyncio.StreamWriter) -> None:
        if prompt == "until it closes":
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\n\r\n".encode() + b"".join(GOOD))
            writer.close()
            return
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for piece in STREAMS.get(prompt, STREAMS["good"])[1]:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
            if prompt == "hangs up inside":
                writer.close()
                return
        writer.write(b"0\r\n\r\n")


def whole(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body
