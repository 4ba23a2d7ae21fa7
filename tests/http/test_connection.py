"""What a client may do to its connection: nothing that it sends, or does not send, hangs the server or is its fault."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from bdh_batch.errors import ConfigError
from bdh_batch.http.auth.caller import by_address
from bdh_batch.http.transport.server import tls_context
from bdh_batch.processes.service import key_ring
from bdh_batch.settings import Auth, Server as ServerSettings, load
from tests.conftest import eventually

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

DATA = Path(__file__).parent.parent / "data"
TINY = DATA / "conformance" / "tiny"
CERT, KEY = DATA / "tls" / "cert.pem", DATA / "tls" / "key.pem"
SECONDS = 2  # that headers and bodies may take
PER_MINUTE = 3
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
HEADERS = b"GET /health HTTP/1.1\r\nx: "

MALFORMED = {
    "no http": b"NONSENSE\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01" * 10,
    "nul in a header": b"GET /health HTTP/1.1\r\nx: a\0b\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nx: a\r\n b\r\n\r\n",
    "bare line feeds": b"GET /health HTTP/1.1\nhost: a\n\n",
    "tunnel": b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n",
    # Two readings of where a request ends: what one server takes for a body, another takes for a request.
    "length and chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + HEALTH,
    "chunks and length": HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n" + HEALTH,
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n123456",
    "negative length": HEAD + b"content-length: -5\r\n\r\n",
    "absurd length": HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
    "unknown coding": HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding before chunks": HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding after chunks": HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "space before colon": HEAD + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    "chunk of no size": CHUNKED + b"ZZ\r\n",
}
TOO_LARGE = {
    "a header": HEADERS + b"a" * 100_000 + b"\r\n\r\n",
    "a header without end": HEADERS + b"a" * 40_000,
    "many headers": b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    "a path": b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    "blank lines": b"\r\n" * 20_000,
}
SLOW = {
    "half a request line": (b"GET / HT", 408),
    "half a header": (b"GET / HTTP/1.1\r\nhost", 408),
    "a body that stalls": (HEAD + b"content-length: 500\r\n\r\n{", 408),
    "a body that does not begin": (HEAD + b"content-length: 500\r\n\r\n", 408),
    "chunks that stall": (CHUNKED + b"5\r\n{", 408),
    "nothing": (b"", None),
    "a body that nobody reads": (b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n", 200),
    "nothing more": (HEALTH, 200),
}


@pytest.fixture(scope="module")
def hasty(serve: ServeFactory) -> Iterator[Server]:
    """Plain HTTP, with little patience."""
    names = ("header_seconds", "body_seconds", "keep_alive_seconds")
    with serve(*(f"limits.{name}={SECONDS}" for name in names), model=TINY) as server:
        yield server


class Client:
    def __init__(self, server: Server, *parts: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=300)
        for part in parts:
            self.socket.sendall(part)

    def responses(self) -> list[tuple[int, dict[str, Any]]]:
        """All that comes until the server closes, which it has to."""
        with self.socket, self.socket.makefile("rb") as file:
            found = []
            while line := file.readline():
                status, length = int(line.split()[1]), 0
                while (line := file.readline()) != b"\r\n":
                    name, _, value = line.partition(b": ")
                    length = int(value) if name == b"content-length" else length
                found.append((status, json.loads(file.read(length))))
            return found


def refused(server: Server, sent: bytes, status: int) -> dict[str, Any]:
    (response,) = Client(server, sent).responses()
    assert response[0] == status
    error: dict[str, Any] = response[1]["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_what_is_not_http_gets_an_error_in_json(tiny: Server) -> None:
    for sent in MALFORMED.values():
        assert refused(tiny, sent, 400)["code"] == "invalid_http"
    assert tiny.metrics()["bdh_http_requests_total{route=unread,status=400}"] >= len(MALFORMED)
    assert "Invalid HTTP" not in tiny.log


def test_heads_that_are_too_large_are_refused(tiny: Server) -> None:
    for sent in TOO_LARGE.values():
        assert refused(tiny, sent, 431)["code"] == "headers_too_large"
    for tail in (b"0\r\n" + b"a: b\r\n" * 60_000, b"1;" + b"a" * 300_000):  # trailers, and extensions of a chunk
        assert refused(tiny, CHUNKED + tail, 431)["code"] == "headers_too_large"
    assert tiny.http.get("/health", headers={"x": "a" * 30_000}).status_code == 200


def test_who_is_slow_is_not_waited_for(hasty: Server) -> None:
    clients = {name: Client(hasty, sent) for name, (sent, _) in SLOW.items()}
    for name, client in clients.items():
        expected = SLOW[name][1]
        assert [status for status, _ in client.responses()] == ([] if expected is None else [expected]), name


def test_a_body_that_drips_has_no_more_time_than_another(hasty: Server) -> None:
    client = Client(hasty, CHUNKED)
    client.socket.setblocking(False)

    def dripped() -> bool:
        try:
            client.socket.sendall(b"1\r\n \r\n")
        except OSError:
            return True
        try:
            return b" 408 " in client.socket.recv(65536, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    eventually(dripped)
    client.socket.close()


def test_odd_requests_are_answered_for_what_they_are(tiny: Server) -> None:
    close = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    odd = {
        close + b"x: \xff\xfe\xc3\r\n\r\n": [200],
        HEALTH * 5 + close + b"\r\n": [200] * 6,
        close.replace(b"/health", b"http://a/health") + b"\r\n": [200],
        close.replace(b"GET /health", b"OPTIONS *") + b"\r\n": [404],
        HEALTH.replace(b"host", b"connection: upgrade\r\nupgrade: h2c\r\nhost") + close + b"\r\n": [200, 200],
        close.replace(b"GET /health", b"POST /v1/completions") + b"content-length: 10000\r\n\r\n" + b"[" * 10_000: [
            400
        ],
    }
    for sent, statuses in odd.items():
        assert [status for status, _ in Client(tiny, sent).responses()] == statuses


def test_nonsense_behind_a_request_is_no_response_to_it(tiny: Server) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 100_000, "stream": True}).encode()
    client = Client(tiny, HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    got = client.socket.recv(65536)
    client.socket.sendall(b"NONSENSE\r\n\r\n")
    with client.socket:
        while more := client.socket.recv(1 << 20):
            got += more
    assert got.count(b"HTTP/1.1") == 1
    tiny.until_idle()


def test_headers_after_a_body_are_not_the_requests(tiny: Server) -> None:
    tail = b"2\r\n{}\r\n0\r\nx-request-id: from-the-trailer\r\n\r\n"
    (response,) = [Client(tiny, CHUNKED.replace(b"host: a", b"host: a\r\nconnection: close") + tail)]
    with response.socket:
        assert b"from-the-trailer" not in response.socket.recv(65536)


def test_addresses_without_keys_share_states(tiny: Server) -> None:
    body = {"prompt": "a prefix that two neighbours have in common, and nobody else", "max_tokens": 1}
    cached = []
    for address in ("127.0.0.2", "127.0.0.3"):
        with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=300) as client:
            usage = client.post(f"{tiny.url}/v1/completions", json=body).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 < cached[1]


@pytest.fixture(scope="module")
def proxied(serve: ServeFactory) -> Iterator[tuple[Server, ssl.SSLContext]]:
    """HTTPS, behind proxies of 127.0.1.0/24, and PER_MINUTE requests for each address."""
    options = (
        *(f"server.tls_cert={CERT}", f"server.tls_key={KEY}", "server.trusted_proxies=127.0.1.0/24,10.0.0.1"),
        *("rate_limiting.enabled=true", f"rate_limiting.requests_per_minute={PER_MINUTE}"),
        f"limits.header_seconds={SECONDS}",
    )
    context = ssl.create_default_context(cafile=CERT)
    with serve(*options, model=TINY, wait=False) as server:
        eventually(lambda: "is ready at" in server.log, what=lambda: server.log)
        yield server, context


def test_https_is_all_there_is_with_a_certificate(proxied: tuple[Server, ssl.SSLContext]) -> None:
    server, context = proxied
    assert f"https://127.0.0.1:{server.port}/v1/completions" in server.log
    with httpx.Client(base_url=f"https://localhost:{server.port}", verify=context, timeout=300) as client:
        assert client.get("/health").status_code == 200
    with pytest.raises(httpx.TransportError):
        server.http.get("/health")


def test_a_handshake_that_does_not_come_is_not_waited_for(proxied: tuple[Server, ssl.SSLContext]) -> None:
    server, context = proxied
    hello = context.wrap_bio(incoming := ssl.MemoryBIO(), outgoing := ssl.MemoryBIO(), server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    clients = [Client(server, sent) for sent in (b"", outgoing.read()[:40])]
    assert not incoming.read()
    for client in clients:
        with client.socket:
            assert client.socket.recv(65536) == b""


def test_a_client_is_known_by_what_the_nearest_proxy_says(proxied: tuple[Server, ssl.SSLContext]) -> None:
    server, context = proxied

    def ask(via: str, *forwarded: str) -> int:
        transport = httpx.HTTPTransport(local_address=via, verify=context)
        with httpx.Client(transport=transport, timeout=300) as client:
            headers = [("x-forwarded-for", value) for value in forwarded]
            return client.get(f"https://127.0.0.1:{server.port}/v1/models", headers=headers).status_code

    # One client, whatever it says itself and whichever proxies it came through.
    ways = [("1.2.3.4",), ("9.9.9.9, 1.2.3.4",), ("8.8.8.8", "1.2.3.4, 10.0.0.1"), ("1.2.3.4",)]
    assert [ask("127.0.1.1", *way) for way in ways] == [200] * PER_MINUTE + [429]
    assert ask("127.0.1.2", "1.2.3.5") == 200
    # Who is no proxy is not believed.
    assert [ask("127.0.2.1", f"1.2.4.{n}") for n in range(PER_MINUTE + 1)] == [200] * PER_MINUTE + [429]


def test_an_address_of_ipv6_is_its_network_and_one_of_ipv4_itself() -> None:
    def label(address: str) -> str:
        return by_address({"client": (address, 1)}).label

    assert label("2001:db8::1") == label("2001:db8::ffff:2") != label("2001:db8:0:1::1")
    assert label("::ffff:1.2.3.4") == label("1.2.3.4") != label("::ffff:1.2.3.5")
    assert label("unknown") != label("") == by_address({"client": None}).label


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tls_cert": CERT}, "server.tls_key"),
        ({"tls_key": KEY}, "server.tls_cert"),
        ({"tls_cert": DATA / "none.pem", "tls_key": KEY}, r"server\.tls_cert.*none\.pem"),
        ({"tls_cert": CERT, "tls_key": DATA}, r"server\.tls_key"),
        ({"tls_cert": CERT, "tls_key": CERT}, r"server\.tls_cert, server\.tls_key"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_refused(options: dict[str, Path], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tls_context(ServerSettings(**options))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("server.trusted_proxies", "10.0.0.0/33"),
        ("server.trusted_proxies", "*"),
        ("rate_limiting.storage", "file:///secret-word"),
        ("rate_limiting.tokens_per_minute", 0),
        *((f"limits.{name}", 0) for name in ("max_header_bytes", "header_seconds", "body_seconds", "max_stop")),
    ],
)
def test_guards_that_cannot_be_are_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option.replace(".", r"\.")) as error:
        load(overrides=[(option, value)])
    assert "secret-word" not in error.value.message


def test_protection_without_keys_is_refused() -> None:
    for option in ("protect_metrics", "protect_docs"):
        with pytest.raises(ConfigError, match=f"auth.{option}"):
            key_ring(Auth(**{option: True}))


def test_a_password_of_redis_is_not_shown() -> None:
    for url in ("redis://:secret-word@host:6379/0", "rediss://host/0?password=secret-word"):
        shown = load(overrides=[("rate_limiting.storage", url)]).show()
        assert "secret-word" not in shown
        assert "host" in shown
