"""The application behind Ray's proxies, which take connections as they come: what its requests hold is bounded here."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh_batch.errors import Unavailable
from bdh_batch.http.transport.exchange import HOLD, RELEASE

RETRY_SECONDS = 2


class BoundedApp:
    """Refuses bodies where those of all requests hold more bytes than they may.

    It responds to the lifespan that Ray asks for: a front end's own is that of its process.

    Args:
        most: bytes of all requests together (limits.max_buffered_bytes).
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        held = _Held(self)

        async def counted() -> Message:
            message = await receive()
            held.add(len(message.get("body", b"")))
            return message

        scope[HOLD], scope[RELEASE] = held.hold, held.release
        try:
            await self._app(scope, counted, send)
        finally:
            held.release(held.size)

    def check(self) -> None:
        """Raises Unavailable: too many bytes are held."""
        if self.held > self._most:
            text = f"The request bodies that are held exceed the limit of {self._most} bytes"
            raise Unavailable(f"{text} (limits.max_buffered_bytes).", retry_after=RETRY_SECONDS)


class _Held:
    """The bytes of one request."""

    def __init__(self, app: BoundedApp) -> None:
        self.size = 0
        self._app = app

    def add(self, size: int) -> None:
        self.size += size
        self._app.held += size
        self._app.check()

    async def hold(self, size: int) -> None:
        self.add(size)
        await asyncio.sleep(0)  # others have their turns

    def release(self, size: int) -> None:
        self.size -= size
        self._app.held -= size
