"""ModelStreamInfer: many requests on one call, each with a stream of responses that have its id.

A caller that sends one request and ends its sending is served as one that sends many and keeps on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from tritonclient.grpc import service_pb2

from bdh_batch.errors import DeadlineExceeded, InvalidRequest, Unavailable
from bdh_batch.http.errors import BodyTimeout, Unauthorized, WriteTimeout
from bdh_batch.http.gate import Gate
from bdh_batch.http.request.client import Client
from bdh_batch.http.responses.chunks import Chunks, Deltas
from bdh_batch.http.responses.generation import abort_when_left, failure_of
from bdh_batch.http.serving import Serving
from bdh_batch.http.tensors.inference import Started, ask, start
from bdh_batch.http.tensors.tensor import Tensor
from bdh_batch.kserve.calls import Call, Calls
from bdh_batch.kserve.messages import infer_request, infer_response, is_raw, parse, stream_error, stream_response
from bdh_batch.messages import Usage

ROUTE = "/inference.GRPCInferenceService/ModelStreamInfer"


class Streams:
    """Serves the calls of ModelStreamInfer, until they are drained."""

    def __init__(self, serving: Serving, calls: Calls) -> None:
        self._serving = serving
        self._calls = calls
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Reads no more requests; a call ends when those that were read have been responded to."""
        self._draining.set()

    async def serve(self, call: Call, messages: AsyncIterator[bytes], trailers: list[tuple[str, str]]) -> None:
        """Serves one call. Raises BDHError: it is not let in, it stalls, or it is drained."""
        caller = self._serving.admission.caller(call.key, call.address)
        if caller is None:  # to be counted, and refused
            with self._calls.request(call, ROUTE, call.header("x-request-id") or "") as request:
                trailers.append(("x-request-id", request.id))
                await self._calls.admit(request)
                raise Unauthorized("Incorrect API key provided.")
        with self._calls.one_of(caller):
            await _Stream(self._serving, self._calls, call).run(messages, self._draining)
        if self._draining.is_set():
            raise Unavailable(f"The server is not ready: {Gate.DRAINING}.", retry_after=5)


class _Stream:
    """One call."""

    def __init__(self, serving: Serving, calls: Calls, call: Call) -> None:
        self._serving = serving
        self._settings, self._limits = serving.settings.kserve, serving.settings.limits
        self._calls = calls
        self._call = call
        self._slots = asyncio.Semaphore(self._settings.max_stream_requests)
        self._idle = Idle(self._settings.idle_seconds)
        self._writing = asyncio.Lock()

    async def run(self, messages: AsyncIterator[bytes], draining: asyncio.Event) -> None:
        """Reads requests, as many at a time as it may have, until the client ends its sending or it is drained.

        Raises BodyTimeout: it has none for too long. Raises WriteTimeout, and DeadlineExceeded: its deadline has come.
        """
        try:
            async with asyncio.TaskGroup() as group:
                async for raw in _until(draining, messages, self._idle):
                    self._idle.begin()
                    await self._slots.acquire()
                    group.create_task(self._serve(raw))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _serve(self, raw: bytes) -> None:
        """Serves one request; what it fails with is a response of its own."""
        id = ""
        try:
            with self._calls.holding(len(raw)):
                message = await self._parsed(raw)
                id = getattr(message, "id", "")[: self._limits.max_label_length]
                with self._calls.request(self._call, ROUTE, id) as request:
                    await self._infer(message, len(raw), await self._calls.admit(request))
        except WriteTimeout:
            raise
        except Exception as error:
            if isinstance(error, DeadlineExceeded) and self._call.is_over():
                raise  # the call's own deadline is its status, whichever side sees it first
            await self._write(stream_error(self._calls.refusal(error), id))
        finally:
            self._slots.release()
            self._idle.end()

    async def _infer(self, message: Any, size: int, client: Client) -> None:
        if isinstance(message, InvalidRequest):
            raise message
        aside = self._serving.aside(client)
        read = await aside.run(size, infer_request, message, self._limits)
        asked = await aside.run(size, ask, self._serving, read, True)
        started = await start(self._serving, client, asked, size)
        await self._respond(started, is_raw(message))

    async def _parsed(self, raw: bytes) -> Any:
        """The ModelInferRequest, or the InvalidRequest that says what is wrong with it: both count as a request."""
        aside = self._serving.off_loop.of(self._call.address.label)
        try:
            return await aside.run(len(raw), parse, raw, service_pb2.ModelInferRequest, self._limits)
        except InvalidRequest as problem:
            return problem

    async def _respond(self, started: Started, raw: bool) -> None:
        if not started.asked.streamed:
            tensors = await started.whole()
            cost = sum(each.cost for each in tensors)
            await self._write(await started.aside.run(cost, self._encoded, started, tensors, raw, True))
            return
        generation, outputs = started.generation, started.outputs
        together = Chunks(started.asked.body.options.chunk_tokens or 1)
        steps = _Steps(started)
        async with abort_when_left(generation, None):
            outputs.begin(generation.prompts)
            async for arrived in generation:
                if (failed := failure_of(arrived)) is not None:
                    raise failed
                deltas = together.take(arrived)
                cost = 0 if outputs.only_text else outputs.cost(generation.prompts, [delta for _, delta in deltas])
                for tensors, last in await started.aside.run(cost, steps.take, deltas):
                    await self._write(self._encoded(started, tensors, raw, last))

    def _encoded(self, started: Started, tensors: Sequence[Tensor], raw: bool, last: bool) -> bytes:
        version = self._settings.model_version
        response = infer_response(started.model_name, version, started.asked.request.id, tensors, raw)
        return stream_response(response, last)

    async def _write(self, response: bytes) -> None:
        """Raises WriteTimeout; CancelledError where the call is over."""
        try:
            async with self._writing, asyncio.timeout(self._limits.write_seconds):
                await self._call.write(response)
        except TimeoutError:
            text = f"The client took nothing of its stream for {self._limits.write_seconds:g} s (limits.write_seconds)."
            raise WriteTimeout(text) from None


class _Steps:
    """What the deltas of one request become: responses, of which the last one is known as such."""

    def __init__(self, started: Started) -> None:
        self._started = started
        self._open = len(started.generation.prompts)
        self._tokens = 0
        self._continuous = started.outputs.continuous_usage

    def take(self, deltas: Deltas) -> list[tuple[Sequence[Tensor], bool]]:
        """The responses, each with whether it is the last."""
        return [response for index, delta in deltas for response in self._of(index, delta)]

    def _of(self, index: int, delta: Any) -> Iterator[tuple[Sequence[Tensor], bool]]:
        self._tokens += len(delta.tokens)
        self._open -= delta.finish_reason is not None
        last = not self._open
        responses = self._started.outputs.step(index, delta, self._usage() if last or self._continuous else None)
        for at, tensors in enumerate(responses, 1):
            yield tensors, last and at == len(responses)

    def _usage(self) -> Usage:
        return self._started.generation.usage(self._tokens)


async def in_time(messages: AsyncIterator[Any], seconds: float) -> AsyncIterator[Any]:
    """The messages, each of which comes within so many seconds. Raises BodyTimeout: one does not."""
    idle = Idle(seconds)
    async for message in _until(asyncio.Event(), messages, idle):
        idle.begin()
        yield message
        idle.end()


class Idle:
    """Watches how long a call has had no request.

    Args:
        seconds: that it may.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._requests = 0
        self._since = time.monotonic()

    def begin(self) -> None:
        self._requests += 1

    def end(self) -> None:
        self._requests -= 1
        self._since = time.monotonic()

    def left(self) -> float:
        """Seconds after which to look again. Raises BodyTimeout: it has had none for too long."""
        if self._requests:
            return self._seconds
        left = self._since + self._seconds - time.monotonic()
        if left <= 0:
            raise BodyTimeout(f"The call had no request for {self._seconds:g} s (kserve.idle_seconds).")
        return left


async def _until(end: asyncio.Event, messages: AsyncIterator[Any], idle: Idle) -> AsyncIterator[Any]:
    """The messages that come before the `end`. Raises BodyTimeout."""
    ending = asyncio.ensure_future(end.wait())
    reading = None
    try:
        while True:
            reading = asyncio.ensure_future(_next(messages))
            while not (reading.done() or ending.done()):
                await asyncio.wait((reading, ending), timeout=idle.left(), return_when=asyncio.FIRST_COMPLETED)
            message = reading.result() if reading.done() else None
            if message is None:
                return
            yield message
    finally:
        ending.cancel()
        if reading is not None:
            reading.cancel()


async def _next(messages: AsyncIterator[Any]) -> Any:
    return await anext(messages, None)
