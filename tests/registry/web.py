"""A web server on loopback that misbehaves as a test tells it to, and that can pass for the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 4096  # bytes from which the Hub keeps a file by its SHA-256


class Web:
    """What the server has, and how it misbehaves; what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}  # by path
        self.repositories: dict[str, dict[str, bytes]] = {}  # by ORG/NAME, by file
        self.cuts: dict[str, list[int]] = {}  # by path: after how many bytes the next responses break off
        self.statuses: dict[str, list[int]] = {}  # by path: of the next responses
        self.redirects: dict[str, str] = {}
        self.held: dict[str, threading.Event] = {}  # by path: half of a response is held back until then
        self.ranges = self.etags = self.lengths = True
        self.encoding: str | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []  # path and headers, lower case
        self.sent = 0  # bytes of bodies
        self.port = 0
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def serve_folder(self, folder: Path, prefix: str = "/model") -> str:
        """Has the files of a folder; their base URL."""
        self.files |= {f"{prefix}/{file.name}": file.read_bytes() for file in folder.iterdir()}
        return self.url + prefix

    def of(self, path: str) -> list[dict[str, str]]:
        """The headers of the requests for a path."""
        return [headers for asked, headers in self.asked if asked == path]


@contextlib.contextmanager
def running(tls: Path | None = None) -> Iterator[Web]:
    """`tls` is a folder with cert.pem and key.pem."""
    web = Web()

    class Handler(_Handler):
        pass

    Handler.web = web
    server = _Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        web.scheme = "https"
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        for event in web.held.values():
            event.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may go away at any time; all else is the server's fault, and printed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: stderr is what tests look at."""

    def do_GET(self) -> None:
        web, path = self.web, unquote(urlsplit(self.path).path)
        web.asked.append((path, {name.lower(): value for name, value in self.headers.items()}))
        if web.statuses.get(path):
            self._empty(web.statuses[path].pop(0))
        elif path in web.redirects:
            self._empty(302, {"location": web.redirects[path]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            self._resolve(match[1], match[2])
        elif path in web.files:
            self._file(path, web.files[path])
        else:
            self._empty(404)

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"content-length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def _info(self, name: str, revision: str) -> None:
        files = self.web.repositories.get(name)
        if files is None:
            self._empty(404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._empty(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [
                {"rfilename": file, "size": len(content), "blobId": "0" * 40}
                | (
                    {"lfs": {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}}
                    if _large(content)
                    else {}
                )
                for file, content in files.items()
            ]
            content = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            self._file("info", content)

    def _resolve(self, name: str, file: str) -> None:
        """Large files lie elsewhere: on another host, as far as a client can see."""
        content = self.web.repositories.get(name, {}).get(file)
        if content is None:
            self._empty(404, {"X-Error-Code": "EntryNotFound"})
        elif _large(content):
            path = f"/cdn/{_sha256(content)}"
            self.web.files[path] = content
            self._empty(302, {"location": f"http://localhost:{self.web.port}{path}?signature=secret"})
        else:
            self._file(f"/{name}/{file}", content)

    def _file(self, path: str, content: bytes) -> None:
        web, etag = self.web, f'"{_sha256(content)}"'
        if web.etags and self.headers.get("if-none-match") == etag:
            self._empty(304, {"etag": etag})
            return
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        if web.ranges and asked and self.headers.get("if-range", etag) == etag:
            start = int(asked[1])
            if start >= len(content):
                self._empty(416, {"content-range": f"bytes */{len(content)}"})
                return
        self.send_response(206 if start else 200)
        body = content[start:]
        if start:
            self.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if web.etags:
            self.send_header("etag", etag)
        if web.encoding is not None:
            self.send_header("content-encoding", web.encoding)
        self.send_header("content-length", str(len(body))) if web.lengths else self.send_header("connection", "close")
        self.end_headers()
        self._body(path, body)

    def _body(self, path: str, body: bytes) -> None:
        web = self.web
        cuts = web.cuts.get(path)
        most = cuts.pop(0) if cuts else len(body)
        self.close_connection = most < len(body) or not web.lengths
        web.sent += len(body[:most])  # before a client can have it, and look
        if path in web.held:
            self.wfile.write(body[: most // 2])
            web.held[path].wait(300)
            self.wfile.write(body[most // 2 : most])
        else:
            self.wfile.write(body[:most])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _large(content: bytes) -> bool:
    return len(content) >= LARGE
