"""Bytes over connections, as they are: for requests that no client library sends, and for clients that read late,
little or never, leave without farewell, or only count. All else goes through `client.py`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import h11

MIB = 2**20
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with an RST, and forget what was not sent
LITTLE = 4096  # bytes of a receive buffer that is soon full
LOST_SECONDS = 60.0  # after which a request counts as unanswered
CLOSED, LEFT, RESET_BY_PEER = "closed", "left", "reset"


def request(method: str, path: str, content: bytes = b"", *headers: str, length: int | None = None) -> bytes:
    """A request as it goes over the wire; with another `length`, the rest of its body never comes."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "connection: close"]
    if content or length is not None:
        lines += ["content-type: application/json", f"content-length: {len(content) if length is None else length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


class Raw(asyncio.Protocol):
    """A connection for bytes; what comes is its subclasses' to look at."""

    async def connect(self, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def write(self, content: bytes) -> None:
        self._transport.write(content)

    def leave(self) -> None:
        self._transport.abort()


@dataclass
class Ending:
    """How a connection ended, and the status of the response; 0 if there was none."""

    how: str
    status: int = 0


async def exchange(port: int, content: bytes, patience: float, source: str | None = None) -> Ending:
    """Sends bytes, and reads until the server closes or the client's patience ends.

    Args:
        patience: seconds.
        source: the address that it comes from; None is any.
    """
    writer, writing, found = None, None, Ending(CLOSED)
    try:
        async with asyncio.timeout(patience):
            local = None if source is None else (source, 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=local)
            writing = asyncio.create_task(_write(writer, content))
            begin = b""
            while piece := await reader.read(MIB):
                if not found.status:
                    begin += piece[:64]
                    found.status = _status(begin)
    except TimeoutError:
        found.how = LEFT
    except OSError:
        found.how = RESET_BY_PEER
    finally:
        if writing is not None:
            writing.cancel()
        if writer is not None:
            writer.transport.abort()
    return found


def _status(begin: bytes) -> int:
    """Of a response that begins so; 0 where that is not all of it yet."""
    _, _, rest = begin.partition(b" ")
    return int(rest[:3]) if len(rest) > 3 and rest[:3].isdigit() else 0


async def _write(writer: asyncio.StreamWriter, content: bytes) -> None:
    for at in range(0, len(content), MIB):
        writer.write(content[at : at + MIB])
        try:
            await writer.drain()
        except OSError:  # the reader learns of it, too
            return


async def status_of(port: int, content: bytes, seconds: float = LOST_SECONDS) -> int:
    """The status of the response to `content`; 0 where none came in so many seconds."""
    found = await exchange(port, content, seconds)
    return found.status if found.how == CLOSED else 0


class Call:
    """One request on a socket that is read only when it is asked to, and what has come of its response so far.

    Args:
        patience: seconds without a byte, after which it hangs.
        little: whether few bytes fill its buffers.
    """

    def __init__(self, patience: float, little: bool = False) -> None:
        self._patience = patience
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if little:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LITTLE)
        self._http = h11.Connection(h11.CLIENT)
        self.status = 0
        self.body = bytearray()
        self.gives_way: asyncio.Event | None = None  # of a later priority: may wait for as long as others come first
        self.whole = False  # all of the response is here
        self.cut = False  # the peer has closed before

    async def open(self, host: str, port: int) -> None:
        async with asyncio.timeout(self._patience):
            await asyncio.get_running_loop().sock_connect(self._socket, (host, port))

    def request(self, method: str, path: str, content: bytes, headers: Mapping[str, str]) -> bytes:
        """The bytes of a request."""
        lines = {"host": "soak", "connection": "close", "content-length": str(len(content)), **headers}
        return b"".join(
            self._http.send(event) or b""
            for event in (
                h11.Request(method=method, target=path, headers=list(lines.items())),
                h11.Data(data=content),
                h11.EndOfMessage(),
            )
        )

    async def send(self, raw: bytes) -> None:
        async with asyncio.timeout(self._patience):
            await asyncio.get_running_loop().sock_sendall(self._socket, raw)

    async def read(self, most: int = 65536) -> None:
        """Takes what is there, at most so many bytes; waits until there is anything.

        Raises:
            TimeoutError: nothing came for as long as its patience.
        """
        got = await self._receive(most)
        self._http.receive_data(got)
        try:
            self._take_in()
        except h11.RemoteProtocolError:  # closed before the response was whole
            self.cut = True

    async def _receive(self, most: int) -> bytes:
        while True:
            pressed = self.gives_way is not None and not self.gives_way.is_set()
            try:
                async with asyncio.timeout(self._patience):
                    return await asyncio.get_running_loop().sock_recv(self._socket, most)
            except TimeoutError:
                if not pressed:
                    raise

    def _take_in(self) -> None:
        while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Response):
                self.status = event.status_code
            elif isinstance(event, h11.Data):
                self.body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self.whole = True
                return
            elif isinstance(event, h11.ConnectionClosed):
                self.cut = True
                return

    @property
    def over(self) -> bool:
        return self.whole or self.cut

    def close(self, reset: bool = False) -> None:
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._socket.close()
