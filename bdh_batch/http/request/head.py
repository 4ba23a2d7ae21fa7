"""Reads the head of a request by RFC 9110 and RFC 9112, and finds where bytes of a client may be cut."""

from __future__ import annotations

import re
from urllib.parse import unquote

import httptools
from starlette.types import Scope

from bdh_batch.http.errors import InvalidHTTP

END = b"\r\n\r\n"  # of every head, and of every body in chunks
BLANK = re.compile(rb"[\r\n]*")
# What a head can be as long as it is not whole, and how it can begin: anything else need not be waited for.
PLAUSIBLE = re.compile(rb"[A-Z][A-Z-]{0,30}(?: [!-~]*(?: (?:H[^\n]*(?:\r\n[^\n]*)*)?)?)?\Z")
START = re.compile(rb"[\r\n]*(?:[A-Z][A-Z-]{0,30}(?: |\Z)|\Z)")
# The parser stops where a client offers another protocol. We need not take the offer (RFC 9110, 7.8), so it has another
# name by the time the parser sees it.
UPGRADE, OFFER = re.compile(rb"\r\nupgrade:", re.IGNORECASE), b"declined-upgrade"
HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]*)?")

Headers = list[tuple[bytes, bytes]]


def without_offer(head: bytes) -> bytes:
    """The head without an offer of another protocol."""
    return UPGRADE.sub(b"\r\n" + OFFER + b":", head)


def body_length(headers: Headers) -> int | None:
    """Bytes of the request's body; None where it comes in chunks."""
    length = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value)
    return length


def fill(scope: Scope, method: bytes, version: str, url: bytes, headers: Headers) -> None:
    """Puts a request's line and what follows from it into `scope`.

    Raises:
        InvalidHTTP: the request cannot be distinguished from another one, or asks for what is no HTTP.
    """
    if version not in ("1.0", "1.1"):
        raise InvalidHTTP(f"HTTP/{version} is not supported; use HTTP/1.1.")
    if method == b"CONNECT":
        raise InvalidHTTP("The method CONNECT is not supported: this server is not a proxy.")
    if version == "1.0" and any(name == b"transfer-encoding" for name, _ in headers):
        raise InvalidHTTP("HTTP/1.0 does not support Transfer-Encoding.")
    if any(name == b"transfer-encoding" and value.strip().lower() != b"chunked" for name, value in headers):
        raise InvalidHTTP("Only the Transfer-Encoding chunked is supported.")
    target = httptools.parse_url(url)
    _check_host([value for name, value in headers if name == b"host"], version)
    if target.host is not None:  # the whole URL says more than the header (RFC 9112, 3.2.2)
        authority = target.host + (b":%d" % target.port if target.port else b"")
        headers[:] = [(b"host", authority), *(pair for pair in headers if pair[0] != b"host")]
    raw_path = target.path or b"/"
    scope["method"] = method.decode("ascii")
    scope["http_version"] = version
    scope["raw_path"] = raw_path
    scope["path"] = unquote(raw_path.decode("ascii"))
    scope["query_string"] = target.query or b""


def _check_host(hosts: list[bytes], version: str) -> None:
    if len(hosts) > 1:
        raise InvalidHTTP("The request has more than one Host header.")
    if not hosts and version != "1.0":
        raise InvalidHTTP("The request has no Host header, which HTTP/1.1 asks for.")
    if hosts and not HOST.fullmatch(hosts[0]):
        raise InvalidHTTP("The request's Host header is not a name or an address, perhaps with a port.")
