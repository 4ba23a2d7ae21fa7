"""HTTP to upstreams: one pool of connections for each, bounded bodies, and faults instead of exceptions."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpcore
import httpx
import orjson

from bdh_batch.errors import ConfigError
from bdh_batch.upstreams.config import HttpUpstream
from bdh_batch.upstreams.protocol import KINDS, Fault, FaultKind
from bdh_batch.upstreams.sse import in_turns

# Bytes that are read at a time, for all async clients here. Interim responses within them are parsed at once,
# and an upstream may send any number of these: 64 KB of `100 Continue` held up all streams for 0.3 s.
httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = 4096

KEEPALIVE_SECONDS = 4.0  # less than most servers keep an idle connection for
LONGEST_ERROR = 65536  # bytes of the body of an error that are read
MOST_CONTAINERS = 32768  # lists and objects of one message: the parser holds up all streams until it has made them


def open_client(upstream: HttpUpstream) -> httpx.AsyncClient:
    """Opens the pool of connections to an upstream. The environment's proxies and netrc are not for it, and it keeps no
    cookies: one client's session would be that of all.

    Raises:
        ConfigError: its key, or its authorities, cannot be read.
    """
    headers = {"accept-encoding": "identity", "user-agent": "bdh_batch", **upstream.headers}
    if (key := upstream.key()) is not None:
        headers["authorization"] = f"Bearer {key}"
    try:
        context = ssl.create_default_context(cafile=None if upstream.ca_file is None else str(upstream.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"upstreams.{upstream.id}.ca_file: {upstream.ca_file} cannot be read: {error}") from error
    seconds = upstream.connect_seconds
    return httpx.AsyncClient(
        headers=headers,
        verify=context,
        trust_env=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        timeout=httpx.Timeout(None, connect=seconds, pool=seconds),
        limits=httpx.Limits(
            max_connections=2 * upstream.max_requests,  # those of health checks, too
            max_keepalive_connections=upstream.max_requests,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
    )


@asynccontextmanager
async def asked(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any] | None = None,
) -> AsyncIterator[httpx.Response]:
    """The response to a request, if it is a good one; its body is yet to be read.

    Raises:
        Fault: there is no response, or another one, or its body breaks off inside the block.
    """
    content = None if body is None else orjson.dumps(body)
    typed = headers if body is None else {"content-type": "application/json", **headers}
    try:
        async with client.stream(method, url, headers=typed, content=content) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Fault(FaultKind.MALFORMED, "a coding that was not asked for")
            if response.status_code != 200:
                raise await _refusal(response)
            yield response
    except httpx.ConnectTimeout as error:
        raise Fault(FaultKind.CONNECT_TIMEOUT) from error
    except httpx.PoolTimeout as error:
        raise Fault(FaultKind.BUSY) from error
    except httpx.ConnectError as error:
        raise Fault(FaultKind.CONNECT) from error
    except httpx.RemoteProtocolError as error:
        closed = "closed" in str(error) or "disconnected" in str(error)
        raise Fault(FaultKind.CLOSED if closed else FaultKind.MALFORMED) from error
    except httpx.HTTPError as error:
        raise Fault(FaultKind.CLOSED) from error
    except AttributeError as error:  # of anyio: what was lost as it opened has no socket to ask for its peer
        if "getpeername" not in str(error):
            raise
        raise Fault(FaultKind.CONNECT) from error


async def read(response: httpx.Response, most: int) -> bytes:
    """Returns the body. Raises Fault where it has more than `most` bytes."""
    content = bytearray()
    async for chunk in in_turns(response.aiter_raw()):
        content += chunk
        if len(content) > most:
            raise Fault(FaultKind.TOO_LARGE)
    return bytes(content)


async def read_json(response: httpx.Response, most: int) -> Any:
    """Returns the body's value. Raises Fault where it is no JSON, or too large."""
    return parsed(await read(response, most))


def parsed(text: bytes | str) -> Any:
    """Returns the value of JSON. Raises Fault where it is none, or too much."""
    if _containers(text) > MOST_CONTAINERS:
        raise Fault(FaultKind.TOO_LARGE, f"more than {MOST_CONTAINERS} lists and objects")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Fault(FaultKind.MALFORMED, "not JSON") from error


def _containers(text: bytes | str) -> int:
    """Returns how many lists and objects JSON has. Brackets in strings count as well where there are few in all."""
    raw = text.encode() if isinstance(text, str) else text
    if raw.count(b"[") + raw.count(b"{") > MOST_CONTAINERS:
        raw = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    return raw.count(b"[") + raw.count(b"{")


def is_alive(fault: Fault) -> bool:
    """Whether a health check that ended with `fault` has found a server that responds: what it asks for may be missing
    there, or not for everybody."""
    return fault.status is not None and fault.status < 500


async def _refusal(response: httpx.Response) -> Fault:
    """Returns the Fault of a refusal. Its own words go to clients only where they are about the request."""
    status = response.status_code
    kind = KINDS.get(status, FaultKind.ERROR)
    if kind is not FaultKind.REFUSED:
        return Fault(kind, f"status {status}", status=status)
    try:
        value = await read_json(response, LONGEST_ERROR)
    except Fault:
        value = None
    message, param = described(value)
    return Fault(FaultKind.REFUSED, message or f"status {status}", param, status)


def described(value: object) -> tuple[str, str | None]:
    """Returns the message, and the field, of an error's body, in the shapes that there are of them."""
    error = value.get("error", value.get("detail", value)) if isinstance(value, dict) else value
    if isinstance(error, dict):
        message, param = error.get("message") or error.get("error"), error.get("param")
        return message if isinstance(message, str) else "", param if isinstance(param, str) else None
    return error if isinstance(error, str) else "", None
