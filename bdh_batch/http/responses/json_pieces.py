"""Writes long JSON piece by piece: no piece keeps the interpreter's lock for more than a few milliseconds.

What is longest, log-probabilities, stays in pieces until it is sent: copying a hundred megabytes takes long, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdh_batch.system.freed_memory import FREED_MEMORY, WORTH_RETURNING

T = TypeVar("T")

PIECE = 4096  # items of a list
TEXT_PIECE = 2**20  # characters
SENT = 2**20  # bytes that are sent at once


def in_pieces(items: Iterable[T], size: int = PIECE) -> Iterator[list[T]]:
    """`items` in lists of `size`; the last one is shorter, and none is empty."""
    left = iter(items)
    while piece := list(islice(left, size)):
        yield piece


def one_list(lists: Iterable[bytes]) -> list[bytes]:
    """The pieces of one JSON list that has the items of several, each of which is JSON and not empty."""
    return [b"[", *between(b",", ([each[1:-1]] for each in lists)), b"]"]


def between(comma: bytes, parts: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """The pieces of all `parts`, with a comma between two of them."""
    for index, part in enumerate(parts):
        if index:
            yield comma
        yield from part


def dump_list(items: Sequence[Any]) -> bytes:
    """JSON of a list of small values."""
    if len(items) <= PIECE:
        return orjson.dumps(list(items))
    return b"".join(one_list(map(orjson.dumps, in_pieces(items))))


def dump_text(text: str) -> list[bytes]:
    """The pieces of the JSON of a string."""
    pieces = (text[begin : begin + TEXT_PIECE] for begin in range(0, len(text), TEXT_PIECE))
    return [b'"', *(orjson.dumps(piece)[1:-1] for piece in pieces), b'"']


async def send_pieces(send: Send, pieces: Iterable[bytes]) -> None:
    """Sends them as part of a body, in chunks that are worth sending."""
    total = 0
    for group in _grouped(pieces):
        total += len(group)
        await send({"type": "http.response.body", "body": group, "more_body": True})
    if total > WORTH_RETURNING:
        FREED_MEMORY.return_soon()


def _grouped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of about SENT bytes; none is empty."""
    group: list[bytes] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= SENT:
            yield b"".join(group)
            group, size = [], 0
    if size:
        yield b"".join(group)


class JsonInPieces(Response):
    """A whole response in JSON, whose pieces are sent one after the other."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self.headers["content-length"] = str(sum(map(len, pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_pieces(send, self._pieces)
        await send({"type": "http.response.body", "body": b""})
