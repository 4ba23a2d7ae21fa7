"""HTTP as RFC 9110 and RFC 9112 have it, where a request could be taken for another, or its response could get lost."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from typing import TYPE_CHECKING

import pytest

from tests.http.raw import Raw, ask, get, post

if TYPE_CHECKING:
    from tests.conftest import Server

SHORT = {"prompt": "a", "max_tokens": 3, "seed": 1}
ENDLESS = {"prompt": "a", "max_tokens": 100_000}
CLOSE = "connection: close"
UPGRADES = {
    "h2c": ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    "websocket": ("connection: upgrade", "UpGrade:websocket", "sec-websocket-version: 13"),
    "several": ("connection: upgrade", "upgrade: h2c", "upgrade: websocket"),
}


class TestHost:
    @pytest.mark.parametrize(
        "lines",
        [
            b"GET /health HTTP/1.1\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: a\r\nHost: b\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: a b\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: a/b\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: u@a\r\n\r\n",
            b"GET /health HTTP/1.0\r\nhost: a\r\nhost: a\r\n\r\n",
        ],
    )
    def test_that_is_missing_doubled_or_none_is_refused(self, tiny: Server, lines: bytes) -> None:
        response = ask(tiny, lines)
        assert (response.status, response.error["code"]) == (400, "invalid_http")
        assert "Host" in response.error["message"]

    @pytest.mark.parametrize("host", [b"a", b"A-b_c.local:80", b"127.0.0.1:8000", b"[::1]:8000", b"", b"localhost:"])
    def test_may_be_a_name_or_an_address(self, tiny: Server, host: bytes) -> None:
        assert ask(tiny, b"GET /health HTTP/1.1\r\nhost: " + host + b"\r\n\r\n").status == 200

    def test_is_not_needed_with_http_1_0(self, tiny: Server) -> None:
        client = Raw(tiny, b"GET /health HTTP/1.0\r\n\r\n")
        assert client.response().status == 200
        assert client.end() == b""

    def test_of_a_whole_url_counts_more_than_the_header(self, tiny: Server) -> None:
        foreign = b"GET http://evil.example/health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        assert ask(tiny, foreign).error["code"] == "host_not_allowed"
        own = b"GET http://localhost/health HTTP/1.1\r\nhost: evil.example\r\n\r\n"
        assert ask(tiny, own).status == 200
        assert ask(tiny, b"GET http://localhost HTTP/1.1\r\nhost: a\r\n\r\n").status == 200


class TestFraming:
    @pytest.mark.parametrize(
        "sent",
        [
            b"POST /v1/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\n{}",
            b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2, 2\r\n\r\n{}",
            b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +2\r\n\r\n{}",
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
            b"GET /health HTTP/1.2\r\nhost: a\r\n\r\n",
            b"GET /health HTTP/2.0\r\nhost: a\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /health\r\n\r\n",
        ],
    )
    def test_that_can_be_read_in_two_ways_is_refused(self, tiny: Server, sent: bytes) -> None:
        client = Raw(tiny, sent)
        response = client.response()
        assert response.status == 400
        assert response.headers["connection"] == "close"
        assert client.end() == b""

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
    def test_does_not_depend_on_how_the_bytes_come(self, tiny: Server, size: int) -> None:
        chunks = b"".join(
            b"%x;x=y\r\n%b\r\n" % (len(part), part)
            for part in (b'{"prompt":', b' "a\\r\\n\\r\\n",', b' "max_tokens": 1}')
        )
        whole = (
            b"\r\n"
            + get()
            + b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            + chunks
            + b"0\r\nx-trailer: y\r\n\r\n"
            + post(SHORT, *UPGRADES["h2c"])
            + get("/nothing", CLOSE)
        )
        client = Raw(tiny)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(whole), size):
            client.socket.sendall(whole[start : start + size])
        assert [client.response().status for _ in range(4)] == [200, 200, 200, 404]
        assert client.end() == b""

    def test_of_a_body_may_have_what_ends_a_head(self, tiny: Server) -> None:
        """Each of its line ends could be taken for the end of the request."""
        body = b'{"prompt": "a",' + b"\r\n\r\n" * 20_000 + b'"max_tokens": 1}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
        client = Raw(
            tiny,
            head + b"content-length: %d\r\n\r\n" % len(body) + body,
            head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
            get("/health", CLOSE),
        )
        assert [client.response().status for _ in range(3)] == [200, 200, 200]
        assert client.end() == b""


@pytest.mark.parametrize("offer", UPGRADES)
def test_an_offer_of_another_protocol_is_not_taken_and_costs_nothing(tiny: Server, offer: str) -> None:
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + "\r\n".join(UPGRADES[offer]).encode()
    chunked += b'\r\ntransfer-encoding: chunked\r\n\r\n1d\r\n{"prompt":"a","max_tokens":1}\r\n0\r\n\r\n'
    client = Raw(
        tiny, post(SHORT, *UPGRADES[offer]), chunked, get("/health", *UPGRADES[offer][:2]), get("/health", CLOSE)
    )
    first = client.response()
    assert json.loads(first.body)["choices"][0]["text"] == tiny.text(**SHORT)
    assert [client.response().status for _ in range(3)] == [200, 200, 200]
    assert client.end() == b""


class TestHttp10:
    def test_has_no_chunks(self, tiny: Server) -> None:
        for stream in (False, True):
            client = Raw(tiny, post(SHORT | {"stream": stream}, "connection: keep-alive", version="1.0"))
            response = client.response()
            assert response.status == 200
            assert "transfer-encoding" not in response.headers
            assert response.headers["connection"] == "close"
            assert response.body.endswith(b"data: [DONE]\n\n" if stream else b"}")
            client.close()

    def test_knows_no_100_continue(self, tiny: Server) -> None:
        assert ask(tiny, post(SHORT, "expect: 100-continue", version="1.0")).status == 200


class TestExpectations:
    def test_a_body_that_is_wanted_is_asked_for(self, tiny: Server) -> None:
        head, _, body = post(SHORT, "expect: 100-continue").partition(b"\r\n\r\n")
        client = Raw(tiny, head + b"\r\n\r\n")
        assert client.status_line() == b"HTTP/1.1 100 Continue\r\n"
        client.socket.sendall(body + get("/health", CLOSE))
        assert [client.response().status, client.response().status] == [200, 200]
        assert client.end() == b""

    def test_a_body_that_is_refused_is_not_and_the_connection_ends(self, tiny: Server) -> None:
        """The client may send it or not: what comes next could be either."""
        client = Raw(tiny, b"POST /nothing HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        response = client.response()
        assert (response.status, response.headers["connection"]) == (404, "close")
        assert client.end() == b""


class TestHalfClose:
    """A client may end its sending when it has asked, and wait for its response."""

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_response_comes_whole(self, tiny: Server, version: str, stream: bool) -> None:
        client = Raw(tiny, post(SHORT | {"max_tokens": 30, "stream": stream}, version=version))
        client.socket.shutdown(socket.SHUT_WR)
        response = client.response()
        assert response.status == 200
        assert b'"finish_reason":"length"' in response.body
        assert client.end() == b""

    def test_all_that_was_asked_for_is_answered(self, tiny: Server) -> None:
        client = Raw(tiny, post(SHORT), post(SHORT | {"stream": True}), get(), get("/nothing"))
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.response().status for _ in range(4)] == [200, 200, 200, 404]
        assert client.end() == b""

    def test_half_a_request_ends_the_connection(self, tiny: Server) -> None:
        for sent in (b"GET / HT", post(SHORT)[:-1], get() + b"GET"):
            client = Raw(tiny, sent)
            client.socket.shutdown(socket.SHUT_WR)
            assert client.end().count(b"HTTP/1.1 ") == (1 if sent.startswith(get()) else 0)
        tiny.until_idle()

    def test_a_client_that_has_gone_is_noticed(self, tiny: Server) -> None:
        client = Raw(tiny, post(ENDLESS | {"n": 2}), get())
        tiny.until(lambda m: m["bdh_num_requests_running"] == 2)
        client.close()
        tiny.until_idle()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/nothing", (), 404),
        ("/v1/models", (), 405),
        ("/v1/completions", ("content-type: text/plain",), 415),
        ("/v1/completions", ("content-encoding: br",), 415),
    ],
)
def test_an_early_refusal_reaches_a_client_that_is_still_sending(
    tiny: Server, path: str, headers: tuple[str, ...], status: int
) -> None:
    """Closed while bytes are unread, the connection would be reset, and the response with it."""
    head = "\r\n".join([f"POST {path} HTTP/1.1", "host: a", CLOSE, *headers, "content-length: 4000000", "", ""])
    client = Raw(tiny, head.encode())
    client.socket.sendall(b" " * 3_000_000)
    assert client.response().status == status
    client.socket.sendall(b" " * 500_000)
    assert client.end() == b""


class TestContentEncoding:
    @pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZip", "deflate", "identity"])
    def test_that_is_known_is_undone(self, tiny: Server, coding: str) -> None:
        raw = json.dumps(SHORT).encode()
        content = {"deflate": zlib.compress(raw), "identity": raw}.get(coding, gzip.compress(raw))
        response = tiny.http.post("/v1/completions", content=content, headers={"content-encoding": coding})
        assert response.json()["choices"][0]["text"] == tiny.text(**SHORT)

    @pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress", "nonsense"])
    def test_that_is_not_is_refused_with_what_is(self, tiny: Server, coding: str) -> None:
        response = tiny.http.post("/v1/completions", content=b"{}", headers={"content-encoding": coding})
        error = tiny.error(response, 415)
        assert coding.split(",")[0] in error["message"]
        assert "gzip" in response.headers["accept-encoding"]

    @pytest.mark.parametrize(
        "content",
        [
            json.dumps(SHORT).encode(),
            gzip.compress(b"{}")[:-1],
            gzip.compress(b"{}") + b"more",
            gzip.compress(b"{}") * 2,
            b"",
        ],
        ids=["not compressed", "cut", "followed by more", "two", "empty"],
    )
    def test_that_the_body_does_not_have_is_refused(self, tiny: Server, content: bytes) -> None:
        response = tiny.http.post("/v1/completions", content=content, headers={"content-encoding": "gzip"})
        assert tiny.error(response, 400)["code"] == "invalid_content_encoding"

    def test_does_not_let_a_body_grow_beyond_its_limit(self, tiny: Server) -> None:
        most = 4 * 2**20
        for size, status in ((most - 40, 200), (most + 1, 413), (2**28, 413)):
            content = gzip.compress(b'{"prompt": "a", "max_tokens": 1' + b" " * (size - 32) + b"}")
            response = tiny.http.post("/v1/completions", content=content, headers={"content-encoding": "gzip"})
            assert response.status_code == status, (size, response.text)


def test_a_web_page_cannot_send_what_browsers_do_not_ask_for(tiny: Server) -> None:
    """A body of no type needs no preflight; where it comes from is all that distinguishes a page from a program."""
    content = json.dumps(SHORT).encode()
    for origin, status in (("http://evil.example", 415), ("null", 415), (tiny.url, 200)):
        response = tiny.http.post("/v1/completions", content=content, headers={"origin": origin})
        assert response.status_code == status
