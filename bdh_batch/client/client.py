"""The client, sync and async: how a call is sent. What can be called is in `calls.py`, once for both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from typing import Any, Concatenate, Self
from urllib.parse import urlsplit

from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

from bdh_batch.client import calls
from bdh_batch.client.calls import Call, Streamed
from bdh_batch.client.errors import Unavailable, Unreachable, meaning, reading, shown
from bdh_batch.client.methods import Arguments, Result, awaited, describe, now
from bdh_batch.client.states import AsyncStates, States

DEFAULT_URL = "http://127.0.0.1:8000"
POLL_SECONDS = 0.1
Streams: Any = Stream  # of a kind that is known when it runs only
AsyncStreams: Any = AsyncStream


def _streamed(
    build: Callable[Arguments, Streamed[Result]],
) -> Callable[Concatenate[BDHClient, Arguments], Iterator[Result]]:
    def method(self: BDHClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Iterator[Result]:
        return self.stream(build(*args, **kwargs))

    describe(method, build)
    return method


def _streamed_later(
    build: Callable[Arguments, Streamed[Result]],
) -> Callable[Concatenate[AsyncBDHClient, Arguments], AsyncIterator[Result]]:
    def method(self: AsyncBDHClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> AsyncIterator[Result]:
        return self.stream(build(*args, **kwargs))

    describe(method, build)
    return method


class BDHClient:
    """Speaks to one server. `openai` is the official client, for all that it can do by itself; `states` are what is
    saved there of what a model remembers.

    Every method raises the errors of `bdh_batch.client.errors`.

    Args:
        base_url: the server's, with or without `/v1`.
        options: of `openai.OpenAI`, such as `timeout` (seconds) and `max_retries`.

    Raises:
        ValueError: `base_url` is no server's, or `api_key` cannot be sent.
    """

    def __init__(self, base_url: str = DEFAULT_URL, api_key: str = "none", **options: Any) -> None:
        self._root = _root(base_url)
        self.openai = OpenAI(base_url=f"{self._root}/v1", api_key=_sendable(api_key), **options)
        self.states = States(self, self.openai, self._root)

    complete = now(calls.complete)
    chat = now(calls.chat)
    stream_complete = _streamed(calls.stream_complete)
    stream_chat = _streamed(calls.stream_chat)
    score = now(calls.score)
    score_all = now(calls.score_all)
    tokenize = now(calls.tokenize)
    tokenize_chat = now(calls.tokenize_chat)
    detokenize = now(calls.detokenize)
    tokenizer_info = now(calls.tokenizer_info)
    server_info = now(calls.server_info)
    metrics = now(calls.metrics)
    health = now(calls.health)
    ready = now(calls.ready)

    def wait_until_ready(self, within: float = 60.0) -> None:
        """Waits until the server takes work.

        Raises:
            Unavailable, Unreachable: it did not `within` that many seconds.
        """
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > POLL_SECONDS:
            try:
                return self.ready(timeout=left)
            except (Unavailable, Unreachable):
                time.sleep(POLL_SECONDS)
        self.ready(timeout=POLL_SECONDS)

    def send(self, call: Call[Result]) -> Result:
        url = self._root + call.path
        with meaning():
            if call.method == "delete":
                response = self.openai.delete(url, cast_to=call.kind, options=call.options)
            elif call.body is None:
                response = self.openai.get(url, cast_to=call.kind, options=call.options)
            else:
                response = self.openai.post(url, cast_to=call.kind, body=call.body, options=call.options)
        with reading():
            return call.read(response)

    def stream(self, call: Streamed[Result]) -> Iterator[Result]:
        with meaning():
            chunks = self.openai.post(
                self._root + call.path,
                cast_to=call.kind,
                body=call.body,
                options=call.options,
                stream=True,
                stream_cls=Streams[call.kind],
            )
        with reading(), closing(chunks):
            yield from chunks

    def close(self) -> None:
        self.openai.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncBDHClient:
    """As BDHClient, with asyncio."""

    def __init__(self, base_url: str = DEFAULT_URL, api_key: str = "none", **options: Any) -> None:
        self._root = _root(base_url)
        self.openai = AsyncOpenAI(base_url=f"{self._root}/v1", api_key=_sendable(api_key), **options)
        self.states = AsyncStates(self, self.openai, self._root)

    complete = awaited(calls.complete)
    chat = awaited(calls.chat)
    stream_complete = _streamed_later(calls.stream_complete)
    stream_chat = _streamed_later(calls.stream_chat)
    score = awaited(calls.score)
    score_all = awaited(calls.score_all)
    tokenize = awaited(calls.tokenize)
    tokenize_chat = awaited(calls.tokenize_chat)
    detokenize = awaited(calls.detokenize)
    tokenizer_info = awaited(calls.tokenizer_info)
    server_info = awaited(calls.server_info)
    metrics = awaited(calls.metrics)
    health = awaited(calls.health)
    ready = awaited(calls.ready)

    async def wait_until_ready(self, within: float = 60.0) -> None:
        """Waits until the server takes work.

        Raises:
            Unavailable, Unreachable: it did not `within` that many seconds.
        """
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > POLL_SECONDS:
            try:
                return await self.ready(timeout=left)
            except (Unavailable, Unreachable):
                await asyncio.sleep(POLL_SECONDS)
        await self.ready(timeout=POLL_SECONDS)

    async def send(self, call: Call[Result]) -> Result:
        url = self._root + call.path
        with meaning():
            if call.method == "delete":
                response = await self.openai.delete(url, cast_to=call.kind, options=call.options)
            elif call.body is None:
                response = await self.openai.get(url, cast_to=call.kind, options=call.options)
            else:
                response = await self.openai.post(url, cast_to=call.kind, body=call.body, options=call.options)
        with reading():
            return call.read(response)

    async def stream(self, call: Streamed[Result]) -> AsyncIterator[Result]:
        with meaning():
            chunks = await self.openai.post(
                self._root + call.path,
                cast_to=call.kind,
                body=call.body,
                options=call.options,
                stream=True,
                stream_cls=AsyncStreams[call.kind],
            )
        with reading():
            async with chunks:
                async for chunk in chunks:
                    yield chunk

    async def close(self) -> None:
        await self.openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


def _root(base_url: str) -> str:
    """Raises ValueError: it is no server's."""
    try:
        parts = urlsplit(base_url)
        is_url = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or parts.query or parts.fragment or any(character <= " " for character in base_url):
        raise ValueError(f"base_url: should be as in {DEFAULT_URL}, not {shown(base_url)!r:.200}")
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def _sendable(api_key: str) -> str:
    """Raises ValueError: no header can have it. The error does not show it."""
    if not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key: has characters that are not visible ASCII")
    return api_key
