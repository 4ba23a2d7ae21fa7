"""Bytes of a connection that its parser has yet to get, cut where a request may end."""

from __future__ import annotations

from enum import Enum

from bdh_batch.http.errors import HeadersTooLarge
from bdh_batch.http.request.head import BLANK, END, PLAUSIBLE, START


class Expecting(Enum):
    """What the next bytes belong to."""

    HEAD = "a request line or headers"
    BODY = "a body of known length"
    CHUNKS = "a body in chunks"
    LATER = "a request that comes after the one that is being answered"


class Incoming:
    """A buffer that gives pieces, none of which reaches beyond the end of a request.

    Args:
        most: bytes that a head may have.
    """

    __slots__ = ("_at", "_buffer", "_most", "unseen")

    def __init__(self, most: int) -> None:
        self._most = most
        self._buffer, self._at = b"", 0
        self.unseen = 0  # bytes that were taken since the parser last made anything of them

    def __len__(self) -> int:
        return len(self._buffer) - self._at

    @property
    def plausible(self) -> bool:
        """Whether it can be the start of a request."""
        return START.match(self._buffer, self._at) is not None

    def add(self, data: bytes) -> None:
        self._buffer, self._at = self._buffer[self._at :] + data, 0

    def clear(self) -> None:
        self._buffer, self._at = b"", 0

    def take(self, size: int) -> bytes:
        """At most so many bytes."""
        piece = self._buffer[self._at : self._at + size]
        self._at += len(piece)
        self.unseen += len(piece)
        if self._at == len(self._buffer):
            self.clear()
        return piece

    def take_chunks(self, most: int) -> bytes:
        """Of a body in chunks, about `most` bytes; none where more has to come first."""
        most = max(most, len(END))
        end = self._buffer.find(END, self._at, self._at + most)
        if end >= 0:
            return self.take(end + len(END) - self._at)
        piece = self._buffer[self._at : self._at + most]
        return self.take(len(piece) - _begun(piece))

    def take_head(self) -> bytes:
        """A head that is whole, or what can only be a mistake; nothing where more has to come first.

        Raises:
            HeadersTooLarge
        """
        blank = BLANK.match(self._buffer, self._at)
        assert blank is not None
        self.unseen += blank.end() - self._at
        self._at = blank.end()
        end = self._buffer.find(END, self._at)
        size = (len(self._buffer) if end < 0 else end + len(END)) - self._at
        if self.unseen + size > self._most:
            raise self.too_large()
        head = self._buffer[self._at : self._at + size]
        return self.take(size) if end >= 0 or (head and not PLAUSIBLE.match(head)) else b""

    def check(self) -> None:
        """Raises HeadersTooLarge: a head without an end, or trailers, or chunks of nothing."""
        if self.unseen > self._most:
            raise self.too_large()

    def too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(
            f"The request's headers exceed the limit of {self._most} bytes (limits.max_header_bytes)."
        )


def _begun(piece: bytes) -> int:
    """How many bytes at the end of `piece` may begin an END."""
    return next((length for length in (3, 2, 1) if piece.endswith(END[:length])), 0)
