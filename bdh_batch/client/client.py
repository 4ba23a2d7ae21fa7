"""The client, sync and async: how a call is sent. What can be called is in `calls.py`, once for both."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

from bdh_batch.client import calls
from bdh_batch.client.calls import Call, Streamed
from bdh_batch.client.errors import Unavailable, Unreachable, meaning

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
DEFAULT_URL = "http://127.0.0.1:8000"
POLL_SECONDS = 0.1
Streams: Any = Stream  # of a kind that is known when it runs only
AsyncStreams: Any = AsyncStream


def _describe(method: Any, build: Callable[..., Any]) -> None:
    """Gives `method` the docstring of `build`, and its parameters after `self`, for introspection."""
    update_wrapper(method, build)
    signature = inspect.signature(build)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])


def _now(build: Callable[Arguments, Call[Result]]) -> Callable[Concatenate[BDHClient, Arguments], Result]:
    def method(self: BDHClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self.send(build(*args, **kwargs))

    _describe(method, build)
    return method


def _awaited(
    build: Callable[Arguments, Call[Result]],
) -> Callable[Concatenate[AsyncBDHClient, Arguments], Awaitable[Result]]:
    def method(self: AsyncBDHClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Awaitable[Result]:
        return self.send(build(*args, **kwargs))

    _describe(method, build)
    return method


def _streamed(
    build: Callable[Arguments, Streamed[Result]],
) -> Callable[Concatenate[BDHClient, Arguments], Iterator[Result]]:
    def method(self: BDHClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Iterator[Result]:
        return self.stream(build(*args, **kwargs))

    _describe(method, build)
    return method


def _streamed_later(
    build: Callable[Arguments, Streamed[Result]],
) -> Callable[Concatenate[AsyncBDHClient, Arguments], AsyncIterator[Result]]:
    def method(self: AsyncBDHClient, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> AsyncIterator[Result]:
        return self.stream(build(*args, **kwargs))

    _describe(method, build)
    return method


class BDHClient:
    """Speaks to one server. `openai` is the official client, for all that it can do by itself.

    Every method raises the errors of `bdh_batch.client.errors`.

    Args:
        base_url: the server's, with or without `/v1`.
        options: of `openai.OpenAI`, such as `timeout` (seconds) and `max_retries`.
    """

    def __init__(self, base_url: str = DEFAULT_URL, api_key: str = "none", **options: Any) -> None:
        self._root = _root(base_url)
        self.openai = OpenAI(base_url=f"{self._root}/v1", api_key=api_key, **options)

    complete = _now(calls.complete)
    chat = _now(calls.chat)
    stream_complete = _streamed(calls.stream_complete)
    stream_chat = _streamed(calls.stream_chat)
    score = _now(calls.score)
    score_all = _now(calls.score_all)
    tokenize = _now(calls.tokenize)
    tokenize_chat = _now(calls.tokenize_chat)
    detokenize = _now(calls.detokenize)
    tokenizer_info = _now(calls.tokenizer_info)
    server_info = _now(calls.server_info)
    metrics = _now(calls.metrics)
    health = _now(calls.health)
    ready = _now(calls.ready)

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
            if call.body is None:
                return call.read(self.openai.get(url, cast_to=call.kind, options=call.options))
            return call.read(self.openai.post(url, cast_to=call.kind, body=call.body, options=call.options))

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
            with closing(chunks):
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
        self.openai = AsyncOpenAI(base_url=f"{self._root}/v1", api_key=api_key, **options)

    complete = _awaited(calls.complete)
    chat = _awaited(calls.chat)
    stream_complete = _streamed_later(calls.stream_complete)
    stream_chat = _streamed_later(calls.stream_chat)
    score = _awaited(calls.score)
    score_all = _awaited(calls.score_all)
    tokenize = _awaited(calls.tokenize)
    tokenize_chat = _awaited(calls.tokenize_chat)
    detokenize = _awaited(calls.detokenize)
    tokenizer_info = _awaited(calls.tokenizer_info)
    server_info = _awaited(calls.server_info)
    metrics = _awaited(calls.metrics)
    health = _awaited(calls.health)
    ready = _awaited(calls.ready)

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
            if call.body is None:
                return call.read(await self.openai.get(url, cast_to=call.kind, options=call.options))
            return call.read(await self.openai.post(url, cast_to=call.kind, body=call.body, options=call.options))

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
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")
