"""What holds for every request, as plain ASGI: its id and its metrics, the size of its body, its key, its rate."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import time
from collections.abc import Iterable, Mapping
from uuid import uuid4

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh_batch.http.errors import BodyTooLarge, RateLimited, Unauthorized, error_response, internal_error
from bdh_batch.telemetry import Metrics

log = logging.getLogger(__name__)

PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/server_info")  # beginnings of paths
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Outermost: gives the request an id (the client's, if it sent a sane one), counts it, answers for what fails."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known_paths: Iterable[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._known_paths = frozenset(known_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(math.ceil((time.perf_counter() - began) * 1000))
            await send(message)

        with self._metrics.http_in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = 499  # as nginx counts them
            except Exception:
                log.exception("request %s to %s failed", request_id, scope["path"])
                if status == 0:
                    await internal_error()(scope, receive, send_with_id)
            finally:
                self._metrics.http_requests.labels(self._route(scope), status).inc()

    def _route(self, scope: Scope) -> str:
        """A label of few values, whatever paths clients try."""
        path = scope["path"]
        if path in self._known_paths:
            return str(path)
        return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


class BodyLimit:
    """Refuses a body over `most` bytes before it is read whole."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = BodyTooLarge(f"A request body may have {self._most} bytes here (limits.max_body_bytes).")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._most:
            await error_response(refusal)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise refusal
            return message

        await self._app(scope, counted, send)


class ApiKeys:
    """Lets requests under /v1, and others that cost or tell something, in that bear one of the keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _guarded(scope):
            key = _bearer(scope)
            if not self._knows(key):
                text = "Incorrect API key." if key else "An API key is needed: Authorization: Bearer KEY."
                await error_response(Unauthorized(text))(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = key_label(key)
        await self._app(scope, receive, send)

    def _knows(self, key: str) -> bool:
        # Digests have one length and all are compared: the time taken tells nothing about any key.
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class RateLimit:
    """Limits requests under /v1 in any minute: by key where keys are asked for, else by address."""

    HEADERS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")

    def __init__(self, app: ASGIApp, requests_per_minute: int, by_key: bool, metrics: Metrics) -> None:
        self._app = app
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._limit = RateLimitItemPerMinute(requests_per_minute)
        self._by_key = by_key
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _guarded(scope):
            who = _digest(_bearer(scope)).hex() if self._by_key else scope["client"][0]
            allowed = self._limiter.hit(self._limit, who)
            window = self._limiter.get_window_stats(self._limit, who)
            wait = max(1, math.ceil(window.reset_time - time.time()))
            standing = (str(self._limit.amount), str(window.remaining), f"{wait}s")
            send = _with_headers(send, dict(zip(self.HEADERS, standing, strict=True)))
            if not allowed:
                self._metrics.refused("rate_limit_exceeded")
                refusal = RateLimited(f"Limited to {self._limit.amount} requests a minute.", retry_after=wait)
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def key_label(key: str) -> str:
    """What a key is called where the key itself has no business."""
    return _digest(key).hex()[:16]


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return wrapped


def _guarded(scope: Scope) -> bool:
    # A preflight bears no key by design; the request that follows it does.
    return str(scope["path"]).startswith(PROTECTED) and scope["method"] != "OPTIONS"


def _bearer(scope: Scope) -> str:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
