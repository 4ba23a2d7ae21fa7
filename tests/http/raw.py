"""A client that sends bytes, and reads responses one by one."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any, Protocol

SECONDS = 300  # what takes longer hangs


class Listener(Protocol):
    """A server, or what stands before one."""

    @property
    def port(self) -> int: ...


@dataclass(frozen=True)
class RawResponse:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Raw:
    def __init__(self, server: Listener, *parts: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)
        self.file = self.socket.makefile("rb")
        for part in parts:
            self.socket.sendall(part)

    def response(self) -> RawResponse:
        """The next response, as its framing says."""
        line = self.file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        while (field := self.file.readline()) != b"\r\n":
            name, _, value = field.decode("latin-1").rstrip().partition(": ")
            headers[name.lower()] = value
        return RawResponse(int(line.split()[1]), headers, self._body(headers))

    def status_line(self) -> bytes:
        """The first line of an interim response, which has no more than that and a blank line."""
        line = self.file.readline()
        assert self.file.readline() == b"\r\n"
        return line

    def end(self) -> bytes:
        """All that still comes until the server closes."""
        try:
            return self.file.read()
        finally:
            self.close()

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return self.file.read(int(headers["content-length"]))
        if "transfer-encoding" not in headers:
            return self.file.read()
        body = b""
        while size := int(self.file.readline(), 16):
            body += self.file.read(size)
            assert self.file.readline() == b"\r\n"
        assert self.file.readline() == b"\r\n"
        return body


def ask(server: Listener, *parts: bytes) -> RawResponse:
    """The first response to what is sent; nobody waits for others."""
    client = Raw(server, *parts)
    try:
        return client.response()
    finally:
        client.close()


def post(body: object, *headers: str, path: str = "/v1/completions", version: str = "1.1", host: str = "a") -> bytes:
    """A request with `body` as JSON."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", f"host: {host}", *headers, f"content-length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content


def get(path: str = "/health", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: a", *headers, "", ""]).encode()
