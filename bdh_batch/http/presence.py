"""Runs work for a client and cancels it when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

T = TypeVar("T")


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is cancelled when the client disconnects. The body must have been read.

    Raises:
        ClientDisconnect
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(left(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def left(receive: Receive) -> None:
    """Returns once the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
