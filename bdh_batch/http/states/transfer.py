"""Files of states on their way from and to clients: piece by piece, never whole in memory."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse

from bdh_batch.errors import InvalidRequest, QueueFull
from bdh_batch.http.errors import BodyTooLarge
from bdh_batch.http.states import header
from bdh_batch.http.states.header import Header
from bdh_batch.http.states.records import About
from bdh_batch.http.transport.exchange import RELEASE
from bdh_batch.messages.state import INVALID
from bdh_batch.store.record import Record
from bdh_batch.system.finite import is_finite
from bdh_batch.system.threads import in_daemon_thread

PIECE = 2**18  # bytes that are read or written at a time, a whole number of numbers
MOST_UPLOADS = 8  # at a time, of which one caller may have half
RETRY_SECONDS = 2
THREAD = "bdh-state-files"


class Uploads:
    """The files that come to this process: so many at a time."""

    def __init__(self, most: int = MOST_UPLOADS) -> None:
        self._most = most
        self._running: Counter[str] = Counter()

    @contextlib.contextmanager
    def one(self, owner: str) -> Iterator[None]:
        """Counts one. Raises QueueFull."""
        if self._running.total() >= self._most or self._running[owner] >= self._most // 2:
            text = f"Too many states are being uploaded ({self._most} at a time; half for one caller)."
            raise QueueFull(text, RETRY_SECONDS)
        self._running[owner] += 1
        try:
            yield
        finally:
            self._running[owner] -= 1
            self._running += Counter()  # without those that have none


class Upload:
    """The file in the body of a request, whose header is read before all else.

    Args:
        most: bytes that it may have.
    """

    def __init__(self, request: Request, most: int) -> None:
        self._release: Callable[[int], None] = request.scope.get(RELEASE, lambda size: None)
        self._pieces = request.stream()
        self._length = request.headers.get("content-length")
        self._most = most
        self._waiting = bytearray()
        self._parts: Sequence[tuple[int, str]] = ()

    async def header(self) -> bytes:
        """The text of its header. Raises InvalidRequest, BodyTooLarge: there is none, or none of a state."""
        await self._fill(header.LENGTH)
        length = header.length_in(self._waiting)
        if header.LENGTH + length > self._most:
            raise too_large(self._most)
        await self._fill(header.LENGTH + length)
        text = bytes(self._waiting[header.LENGTH : header.LENGTH + length])
        del self._waiting[: header.LENGTH + length]  # it counts until the request has been answered
        return text

    def check(self, found: Header, text: bytes) -> None:
        """Raises InvalidRequest, BodyTooLarge: what is still to come is not what its header says, or is too much."""
        whole = header.LENGTH + len(text) + found.size
        if whole > self._most:
            raise too_large(self._most)
        if self._length is not None and int(self._length) != whole:
            raise _cut(f"it has {self._length} bytes, and by its header {whole}")
        self._parts = found.parts

    async def tensors(self) -> AsyncIterator[bytes]:
        """The tensors, in pieces. Raises InvalidRequest: they are cut off, there is more, or a number is not finite."""
        for left, dtype in self._parts:
            while left:
                await self._fill(min(left, PIECE))
                piece = bytes(self._waiting[: min(left, PIECE)])
                del self._waiting[: len(piece)]
                self._release(len(piece))
                left -= len(piece)
                check_finite(piece, dtype)
                yield piece
        if self._waiting or await self._more():
            raise _cut(f"there is more behind its {sum(size for size, _ in self._parts)} bytes")

    async def _fill(self, size: int) -> None:
        while len(self._waiting) < size:
            if not await self._more():
                raise _cut("it ends too soon")

    async def _more(self) -> bool:
        """Whether there was more."""
        async for piece in self._pieces:
            if piece:
                self._waiting += piece
                return True
        return False


def check_finite(piece: bytes, dtype: str) -> None:
    """Raises InvalidRequest: a number in a piece of a client's file is not finite."""
    if not is_finite(piece, dtype):
        text = "The state cannot be used: it has numbers that are not finite."
        raise InvalidRequest(text, header.FILE, INVALID)


def head_of(record: Record, found: Header) -> bytes:
    """What a client's copy of a file begins with: it has the tokens."""
    tokens, about = array("i", record.tokens), About.of(record)
    metadata = {
        **found.metadata,
        header.TOKEN_IDS: header.written(tokens),
        "model": about.model,
        "metadata": orjson.dumps(about.metadata).decode(),
    }
    return found.encoded(metadata)


def download(path: Path, id: str, head: bytes, size: int) -> StreamingResponse:
    """A file as a client gets it: with another head, before its last `size` bytes."""
    headers = {
        "content-length": str(len(head) + size),
        "content-disposition": f'attachment; filename="{id}.safetensors"',
    }
    pieces = _pieces(path, head, size)
    return StreamingResponse(pieces, headers=headers, media_type="application/octet-stream")


async def _pieces(path: Path, head: bytes, size: int) -> AsyncIterator[bytes]:
    yield head
    file: BinaryIO = await in_daemon_thread(lambda: path.open("rb"), THREAD)
    try:
        await in_daemon_thread(partial(file.seek, -size, os.SEEK_END), THREAD)
        while piece := await in_daemon_thread(partial(file.read, PIECE), THREAD):
            yield piece
    finally:
        file.close()


def too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The file exceeds the limit of {most} bytes (store.max_state_bytes).")


def _cut(problem: str) -> InvalidRequest:
    return InvalidRequest(f"The file is no whole state: {problem}.", header.FILE, INVALID)
