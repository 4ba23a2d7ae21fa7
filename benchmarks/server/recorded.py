"""What pages in a browser ask a server for, recorded once, and asked for again at the same moments by a plain client.

A user's browser is not on the server's machine. One beside the server would slow it down by the cores, caches and
memory that it takes, which is no cost of the page's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from playwright.async_api import Page, Request

from bdh_batch.bench.connection import Address, Pool
from bdh_batch.bench.outcome import Failed
from benchmarks.client import Client

OF_CONNECTION = ("host", "content-length", "connection")  # headers that a client's connection adds


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Args:
        after: seconds from the beginning; 0 of what was under way by then.
        lasts: whether it was under way from the beginning to the end.
    """

    after: float
    lasts: bool
    request: bytes
    what: str


class Recorder:
    """Notes what pages ask for."""

    def __init__(self, pages: Sequence[Page], server: Client) -> None:
        self._server = server
        self._begun: dict[Request, float] = {}
        self._ended: dict[Request, float] = {}
        for page in pages:
            page.on("request", self._begin)
            page.on("requestfinished", self._end)
            page.on("requestfailed", self._end)

    def _begin(self, request: Request) -> None:
        self._begun[request] = time.perf_counter()

    def _end(self, request: Request) -> None:
        self._ended[request] = time.perf_counter()

    async def asked(self, since: float) -> list[Asked]:
        """Returns what was asked for, or was under way, since a moment of `time.perf_counter`."""
        ended = {**self._ended}
        found = []
        for request, begun in self._begun.items():
            if ended.get(request, since) >= since:
                what = f"{request.method} {self._path(request).partition('?')[0]}"
                lasts = begun <= since and request not in ended
                found.append(Asked(max(0.0, begun - since), lasts, await self._encoded(request), what))
        return found

    async def _encoded(self, request: Request) -> bytes:
        headers = {
            name: value
            for name, value in (await request.all_headers()).items()
            if name not in OF_CONNECTION and not name.startswith(":")
        }
        return self._server.address.request(
            request.method, self._path(request), headers, request.post_data_buffer or b""
        )

    def _path(self, request: Request) -> str:
        return request.url.removeprefix(self._server.url)


class Discarding:
    """Reads a response and keeps nothing of it. Implements `bench.connection.ResponseReader`."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.failure: Failed | None = None
        self.status = 0

    def begin(self, status: int, content_type: str) -> None:
        self.status = status

    def take(self, body: bytes, now: float) -> None: ...


class Playing:
    """Asks a server for what was recorded, at the same moments from now on."""

    def __init__(self, asked: Sequence[Asked], address: Address) -> None:
        self._pool = Pool(address)
        self._readers = [(each, Discarding()) for each in asked]
        self._tasks = [asyncio.create_task(self._ask(each, reader)) for each, reader in self._readers]

    async def _ask(self, asked: Asked, reader: Discarding) -> None:
        await asyncio.sleep(asked.after)
        await self._pool.exchange(asked.request, reader)

    @property
    def begun(self) -> int:
        """Responses that have begun."""
        return sum(reader.status > 0 for _, reader in self._readers)

    @property
    def complete(self) -> int:
        return sum(task.done() for task in self._tasks)

    def check(self) -> None:
        """Raises RuntimeError where the server has refused something, or ended what pages had until the end."""
        for (asked, reader), task in zip(self._readers, self._tasks, strict=True):
            error = task.exception() if task.done() else None
            if error is not None or reader.status >= 400 or (asked.lasts and task.done()):
                raise RuntimeError(f"{asked.what}: status {reader.status}, {error or 'it has ended'}") from error

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.close()
