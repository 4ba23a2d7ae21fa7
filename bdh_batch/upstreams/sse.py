"""Server-sent events of an upstream, within bounds: what is longer, or no UTF-8, ends the stream with a Fault."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from bdh_batch.upstreams.protocol import Fault, FaultKind

Item = TypeVar("Item")

ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")  # of an event
LONGEST_END = max(map(len, ENDS))
SLICE = 64  # events, or chunks of a body, that are read at a time
SLICE_BYTES = 4096  # that are: each may be a line of its own


async def in_turns(source: AsyncIterable[Item]) -> AsyncIterator[Item]:
    """Yields what `source` does, and lets other work run in between: a thousand items may have come in one packet, and
    nothing else may want to wait until all have been read."""
    number = 0
    async for item in source:
        number += 1
        if number % SLICE == 0:
            await asyncio.sleep(0)
        yield item


class Bounded(httpx.AsyncByteStream):
    """The bytes of a stream of events, none of which may have more than `most`."""

    def __init__(self, stream: httpx.AsyncByteStream, most: int) -> None:
        self._stream = stream
        self._most = most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        since, tail = 0, b""  # bytes since the last end of an event, and the last of them
        async for chunk in in_turns(self._stream):
            try:
                utf8.decode(chunk)
            except UnicodeDecodeError:
                raise Fault(FaultKind.MALFORMED, "not UTF-8") from None  # the error has the text, which is not logged
            together = tail + chunk
            end = max(together.rfind(end) + len(end) if end in together else 0 for end in ENDS)
            since = len(together) - end if end else since + len(chunk)
            tail = together[-LONGEST_END + 1 :]
            if since > self._most:
                raise Fault(FaultKind.TOO_LARGE)
            yield chunk[:SLICE_BYTES]
            for begin in range(SLICE_BYTES, len(chunk), SLICE_BYTES):
                await asyncio.sleep(0)  # as above, of lines
                yield chunk[begin : begin + SLICE_BYTES]

    async def aclose(self) -> None:
        await self._stream.aclose()


async def events(response: httpx.Response, most: int) -> AsyncGenerator[ServerSentEvent, None]:
    """Yields the events of a response, of at most `most` bytes each. Raises Fault."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    response.stream = Bounded(response.stream, most)
    response.encoding = "utf-8"  # whatever it says
    try:
        async with aclosing(EventSource(response).aiter_sse()) as source:
            async for event in in_turns(source):
                yield event
    except SSEError as error:
        raise Fault(FaultKind.MALFORMED, "no event stream") from error
