"""A real server in a process of its own, and clients that cost little: raw HTTP/1.1 on asyncio's transports.

A client notes the moment at which bytes are read and keeps them; what they say is parsed after the measurement.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httptools
import orjson
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
START_SECONDS = 180.0  # where no cache holds the kernels yet, they are compiled first
STOP_SECONDS = 30.0
TICK = 0.005


@dataclass
class Response:
    """What a stream brought: the moment at which each token was read, in seconds of `time.perf_counter`."""

    sent: float
    status: int = 0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    complete: bool = False

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent


class Stream(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._pieces: list[tuple[float, bytes]] = []
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set_result(None)

    @property
    def pieces(self) -> int:
        return len(self._pieces)

    async def end(self) -> Response:
        """Waits for the server to close; what it sent must be a whole response."""
        await self._closed
        response = self.response()
        if not response.complete or response.status != 200:
            raise RuntimeError(f"status {response.status}: {b''.join(data for _, data in self._pieces)[-500:]!r}")
        return response

    async def leave(self) -> Response:
        """Closes, as a client that has had enough."""
        self._transport.abort()
        await self._closed
        return self.response()

    def response(self) -> Response:
        reader = _Reader(Response(self.sent))
        parser = httptools.HttpResponseParser(reader)
        for reader.now, data in self._pieces:
            parser.feed_data(data)
            reader.response.status = parser.get_status_code()
        return reader.response


class _Reader:
    """Takes a response's body as httptools finds it, and cuts it into events."""

    def __init__(self, response: Response) -> None:
        self.response = response
        self.now = 0.0
        self._rest = b""

    def on_body(self, body: bytes) -> None:
        *frames, self._rest = (self._rest + body).split(b"\n\n")
        for frame in frames:
            self._take(frame.removeprefix(b"data: "))

    def _take(self, frame: bytes) -> None:
        if frame == b"[DONE]":
            self.response.complete = True
            return
        event = orjson.loads(frame)
        self.response.prompt += (
            event.get("prompt_token_ids") or []
        )  # of a chat; of completions, they are in the choices
        for choice in event.get("choices", ()):
            self.response.prompt += choice.get("prompt_token_ids") or []
            tokens = choice.get("token_ids") or []
            self.response.tokens += tokens
            self.response.times += [self.now] * len(tokens)
        if usage := event.get("usage"):
            self.response.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


class Served:
    """A server that runs, and the ways to speak to it."""

    def __init__(self, port: int, pid: int = 0, process: subprocess.Popen[bytes] | None = None) -> None:
        self.port = port
        self.pid = pid
        self.process = process  # where it was started here
        self.url = f"http://127.0.0.1:{port}"

    async def send(self, path: str = "/v1/completions", key: str = "", **body: Any) -> Stream:
        """Sends a request whose response streams, token by token."""
        whole = {**body, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        content = orjson.dumps(whole)
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: Stream(head.encode() + content), "127.0.0.1", self.port)
        return stream

    async def ask(self, path: str = "/v1/completions", key: str = "", **body: Any) -> Response:
        return await (await self.send(path, key, **body)).end()

    def get(self, path: str) -> str:
        """Blocks: not for while something is measured."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
            text: str = response.read().decode()
        return text

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics"))
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@contextmanager
def served(
    *options: str, module: Sequence[str] = ("bdh_batch", "serve"), log: Path | None = None, root: Path = ROOT
) -> Iterator[Served]:
    """`bdh-batch serve` with `options`, as in "scheduler.max_running=64", until the block's end.

    Args:
        module: what is run instead, and its arguments; it takes the same `--port` and `--set`.
        log: the file that its output goes to; None keeps it only until it has started.
        root: the checkout whose server it is.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", *module, "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("BDH_")}
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as output:
        process = subprocess.Popen(
            [*command, *(part for option in options for part in ("--set", option))],
            cwd=root,
            env={**environment, "PYTHONPATH": str(root)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            server = Served(port, process.pid, process)
            _wait_until_ready(server, process, output)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            finally:
                process.kill()


def _wait_until_ready(server: Served, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            server.get("/readyz")
            return
        except OSError:  # not there yet, or too busy with its start to response
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read().decode()}") from None
        time.sleep(0.05)


def load_json(file: Path) -> dict[str, Any]:
    """What a file holds, nothing where there is none."""
    held: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return held
