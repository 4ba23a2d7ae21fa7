"""Fake upstreams on loopback: each does with a request what a test tells it to, byte by byte if need be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import orjson
from tritonclient.grpc import service_pb2, service_pb2_grpc

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


@dataclass
class Asked:
    """A request as a fake has got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Connection:
    """The fake's side of a connection, once a request has come."""

    asked: Asked
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def events(self, *values: Any, done: bool = True) -> None:
        """Sends values as events of OpenAI's API."""
        await self.send(HEAD, *(b"data: " + orjson.dumps(value) + b"\n\n" for value in values))
        if done:
            await self.send(b"data: [DONE]\n\n")

    async def gradio(self, *events: tuple[str, Any]) -> None:
        """Sends events of Gradio's API."""
        await self.send(HEAD, *(b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(v)) for name, v in events))

    async def json(self, value: Any, status: int = 200) -> None:
        content = orjson.dumps(value)
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
        await self.send(head.encode() + b"connection: close\r\n\r\n" + content)

    async def until_left(self) -> None:
        """Waits until the client closes the connection."""
        while await self.reader.read(65536):
            pass


Script = Callable[[Connection], Awaitable[None]]


def chunk(text: str | None = None, reason: str | None = None, chat: bool = False, **members: Any) -> dict[str, Any]:
    """An event of a stream of OpenAI's API."""
    said = {"delta": {} if text is None else {"content": text}} if chat else {"text": text or ""}
    return {"id": "x", "choices": [{"index": 0, **said, "finish_reason": reason}], **members}


@dataclass
class Web:
    """A fake server of HTTP. It answers health checks by itself, and counts how often requests were left."""

    script: Script
    asked: list[Asked] = field(default_factory=list)
    left: int = 0
    healthy: bool = True
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await _read(reader)
            connection = Connection(asked, reader, writer)
            if asked.path.endswith(("/models", "/app_id")):
                await connection.json({"data": []}, 200 if self.healthy else 500)
                return
            self.asked.append(asked)
            await self.script(connection)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left += 1
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(method, path, headers, orjson.loads(content) if content else None)


@contextlib.asynccontextmanager
async def web(script: Script) -> AsyncIterator[Web]:
    fake = Web(script)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0, limit=2**22)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()


StreamScript = Callable[[Any, Any], AsyncGenerator[Any, None]]


def tensor(name: str, value: Any, datatype: str = "BYTES", shape: Sequence[int] = (1,)) -> Any:
    """An output tensor with typed contents."""
    made = service_pb2.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    values = value if isinstance(value, list) else [value]
    member = {"BYTES": "bytes_contents", "INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}
    getattr(made.contents, member[datatype]).extend(
        [each.encode() if isinstance(each, str) else each for each in values]
    )
    return made


def token(request: Any, text: str | bytes, reason: str = "null", *outputs: Any, name: str = "token") -> Any:
    """A response of a stream, as AnyServe's worker sends it."""
    made = service_pb2.ModelStreamInferResponse()
    made.infer_response.model_name, made.infer_response.id = request.model_name, request.id
    made.infer_response.outputs.extend([tensor(name, text), tensor("finish_reason", reason), *outputs])
    return made


class Worker(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A fake worker of KServe v2, which streams what its script yields for a request."""

    def __init__(self, script: StreamScript, whole: Callable[[Any], Any] | None, name: str, fingerprint: str) -> None:
        self.script = script
        self.whole = whole
        self.name = name
        self.fingerprint = fingerprint
        self.asked: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.address = ""
        self.server: Any = None

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerMetadataResponse(name=self.name)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.fingerprint:
            context.set_trailing_metadata((("x-model-fingerprint", self.fingerprint),))
        return service_pb2.ModelMetadataResponse(name=request.name)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._note(request, context)
        if self.whole is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no ModelInfer")
        assert self.whole is not None
        return self.whole(request)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802
        async for request in requests:
            self._note(request, context)
            async with contextlib.aclosing(self.script(request, context)) as script:
                async for response in script:
                    yield response

    def _note(self, request: Any, context: Any) -> None:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))


@contextlib.asynccontextmanager
async def worker(
    script: StreamScript, whole: Callable[[Any], Any] | None = None, name: str = "fake", fingerprint: str = ""
) -> AsyncIterator[Worker]:
    fake = Worker(script, whole, name, fingerprint)
    fake.server = grpc.aio.server(options=[("grpc.max_send_message_length", 2**30)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, fake.server)
    fake.address = f"127.0.0.1:{fake.server.add_insecure_port('127.0.0.1:0')}"
    await fake.server.start()
    try:
        yield fake
    finally:
        await fake.server.stop(0)
