"""Requests to the server's own application, without a connection: the bodies of responses are those over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message

from bdh_batch.http.transport.exchange import HOLD, RELEASE

HERE = ("127.0.0.1", 0)  # a program of this machine


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response."""

    request_id: str
    status: int
    headers: dict[str, str]
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes) -> Response:
    """The response to a POST of JSON."""
    request_id, head, pieces = uuid4().hex, dict[str, Any](), list[bytes]()
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()  # whoever asks stays until the end
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
        else:
            pieces.append(message.get("body", b""))

    await app(_scope(path, request_id, len(body)), receive, send)
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head["headers"]}
    return Response(request_id, head["status"], headers, b"".join(pieces))


def _scope(path: str, request_id: str, length: int) -> dict[str, Any]:
    headers = {"content-type": "application/json", "content-length": str(length), "x-request-id": request_id}
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": HERE,
        "server": HERE,
        "state": {},
        HOLD: _hold,
        RELEASE: lambda size: None,
    }


async def _hold(size: int) -> None:
    """The bytes of one line's body are bounded as it is."""
