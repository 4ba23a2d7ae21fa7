"""Checks by a request's headers that its body is JSON, or a file, and decompresses JSON that is compressed."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from bdh_batch.http.errors import InvalidCoding, UnsupportedMedia

ZLIB_AND_GZIP = 32 + zlib.MAX_WBITS
CODINGS = ("gzip", "x-gzip", "deflate")
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")
Hold = Callable[[int], Awaitable[None]]
JSON_LENGTH = "inference-header-content-length"  # bytes of JSON that a body begins with, before those of tensors
FILE = "application/octet-stream"  # which no page may send to another's server without asking that first
PIECE = 256 * 1024  # bytes that are decompressed before others have their turn


def check_type(headers: Headers, origins: Collection[str]) -> None:
    """Lets JSON pass, and a body of no type that no web page from elsewhere has sent.

    A browser lets a page send plain text, a form, or a body of no type to any server, without asking that first; for
    JSON it asks (CORS).

    Args:
        origins: web pages that may call.

    Raises:
        UnsupportedMedia
    """
    kind, _, parameters = headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    if not kind and not _is_foreign(headers, origins):
        return
    if kind == FILE and JSON_LENGTH in headers:
        return
    if not (kind in ("application/json", "text/json") or kind.endswith("+json")):
        raise UnsupportedMedia(
            f"The body is {kind or 'of no type'}; JSON is expected: send the header content-type: application/json."
        )
    charset = _parameter(parameters, "charset")
    if charset and charset not in CHARSETS:
        raise UnsupportedMedia(f"The charset {charset} is not supported; JSON is in UTF-8.")


def check_file(headers: Headers, origins: Collection[str]) -> None:
    """Lets a file pass, as it is, and a body of no type as `check_type` does. Raises UnsupportedMedia."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FILE and (kind or _is_foreign(headers, origins)):
        raise UnsupportedMedia(f"The body is {kind or 'of no type'}; a file is expected: send content-type: {FILE}.")
    coding = ",".join(headers.getlist("content-encoding")).strip().lower()
    if coding not in ("", "identity"):
        raise UnsupportedMedia(f"The Content-Encoding {coding} is not supported for files; identity is.")


def decoded(receive: Receive, headers: Headers, hold: Hold) -> Receive:
    """Receives the body as it was before it was compressed.

    Args:
        hold: called with every piece's size, and awaited before the next one is made; may raise to end it.

    Raises:
        UnsupportedMedia: it is in a coding that is not understood.
    """
    coding = ",".join(headers.getlist("content-encoding")).strip().lower()
    if coding in ("", "identity"):
        return receive
    if coding not in CODINGS:
        raise UnsupportedMedia(f"The Content-Encoding {coding} is not supported; gzip, deflate and identity are.")
    return Decompressed(receive, hold)


class Decompressed:
    """An ASGI `receive` of what another one compresses; in bounded pieces, with others' turns between them.

    Raises, when it is called:
        InvalidCoding: that is neither gzip nor zlib, is cut, or has more behind it.
    """

    def __init__(self, receive: Receive, hold: Hold) -> None:
        self._receive = receive
        self._hold = hold
        self._zlib = zlib.decompressobj(ZLIB_AND_GZIP)
        self._input = b""
        self._more = True  # there is more to receive
        self._full = False  # there may be more in what was received
        self._ended = False

    async def __call__(self) -> Message:
        if self._ended:
            return await self._receive()
        while True:
            if self._more and not self._input and not self._full:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._input, self._more = message.get("body", b""), message.get("more_body", False)
            piece = self._decompress()
            if piece:
                await self._hold(len(piece))
                return {"type": "http.request", "body": piece, "more_body": True}
            if not (self._more or self._input or self._full):
                return self._end()

    def _decompress(self) -> bytes:
        try:
            piece = self._zlib.decompress(self._input, PIECE)
        except zlib.error as error:
            raise InvalidCoding("The body cannot be decoded by its Content-Encoding.") from error
        if self._zlib.unused_data:
            raise InvalidCoding("The body has data after its compressed content.")
        self._input, self._full = self._zlib.unconsumed_tail, len(piece) == PIECE
        return piece

    def _end(self) -> Message:
        if not self._zlib.eof:
            raise InvalidCoding("The body's compressed content is truncated.")
        self._ended = True
        return {"type": "http.request", "body": b"", "more_body": False}


def _is_foreign(headers: Headers, origins: Collection[str]) -> bool:
    """Whether a web page that is neither this server's own nor one of `origins` sent the request."""
    origin = headers.get("origin")
    if origin is None or "*" in origins or origin in origins:
        return False
    return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


def _parameter(parameters: str, wanted: str) -> str:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == wanted:
            return value.strip().strip('"').lower()
    return ""
