"""Server-sent events, strictly: what is not one is an error, and what is not ended by a blank line is none."""

from __future__ import annotations

from collections.abc import Iterator

from bdh_batch.bench.outcome import Failed

FIELDS = {b"data", b"event", b"id", b"retry"}


class Events:
    """Takes a body as it comes, in any pieces, and gives the name, empty where it has none, and data of each event."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> Iterator[tuple[bytes, bytes]]:
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                self._take(line)
            else:
                name, data, self._name, self._data = self._name, self._data, b"", []
                if data:
                    yield name, b"\n".join(data)

    @property
    def unfinished(self) -> bool:
        return bool(self._rest or self._data)

    def _take(self, line: bytes) -> None:
        if line.startswith(b":"):  # a comment, as for keeping the connection alive
            return
        name, colon, value = line.partition(b":")
        if not colon or name not in FIELDS:
            raise Failed("malformed_sse", f"a line that is no field of an event: {line[:80]!r}")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value
