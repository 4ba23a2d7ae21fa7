"""A gateway, started with the upstreams that a test wants, and fakes behind it that do what the test tells them to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from tests.conftest import ServeFactory, Server, free_port
from tests.upstreams.fakes import Connection

BHARATGEN = {
    "api": "chat_fn_1",
    "inputs": ["{message}", "{history}", "{system}", "{temperature}", "{max_tokens}", "{top_p}", 50],
    "history": "pairs",
    "system": "You are a helpful AI assistant.",
    "defaults": {"temperature": 0.7, "max_tokens": 2048, "top_p": 1.0},
}


def options(*upstreams: dict[str, Any]) -> str:
    return f"upstreams={json.dumps(upstreams)}"


@contextlib.asynccontextmanager
async def gateway(serve: ServeFactory, *upstreams: dict[str, Any], grpc_port: int = 0) -> AsyncIterator[Server]:
    more = [f"kserve.grpc_port={grpc_port}"] if grpc_port else []
    context = serve(options(*upstreams), *more, verb="gateway")
    server = await asyncio.to_thread(context.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(context.__exit__, None, None, None)


class Behind:
    """What is behind the gateway of these tests; each fake does what a test tells it to."""

    def __init__(self) -> None:
        self.grpc_port = free_port()  # of the gateway itself
        self.web: Callable[[Connection], Any] = self._unset
        self.stream: Callable[[Any, Any], Any] = self._unset
        self.whole: Callable[[Any], Any] = self._unset

    def _unset(self, *_: Any) -> Any:
        raise AssertionError("no test has said what to do")
