"""Writes long JSON piece by piece: no piece keeps the interpreter's lock for more than a few milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import orjson

T = TypeVar("T")

PIECE = 4096  # items of a list
TEXT_PIECE = 2**20  # characters


def in_pieces(items: Iterable[T], size: int = PIECE) -> Iterator[list[T]]:
    """`items` in lists of `size`; the last one is shorter, and none is empty."""
    left = iter(items)
    while piece := list(islice(left, size)):
        yield piece


def joined(lists: Iterable[bytes]) -> bytes:
    """One JSON list of several, each of which is JSON and not empty."""
    return b"[" + b",".join([each[1:-1] for each in lists]) + b"]"


def dump_list(items: Sequence[Any]) -> bytes:
    """JSON of a list of small values."""
    if len(items) <= PIECE:
        return orjson.dumps(list(items))
    return joined(map(orjson.dumps, in_pieces(items)))


def dump_text(text: str) -> bytes:
    """JSON of a string."""
    if len(text) <= TEXT_PIECE:
        return orjson.dumps(text)
    pieces = (text[begin : begin + TEXT_PIECE] for begin in range(0, len(text), TEXT_PIECE))
    return b'"' + b"".join([orjson.dumps(piece)[1:-1] for piece in pieces]) + b'"'
