"""The middleware of every request, as plain ASGI: its id and its metrics, its body's size, its origin."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh_batch.http.auth.rates import HEADERS
from bdh_batch.http.endpoints import ENDPOINTS, Paths
from bdh_batch.http.errors import (
    MESSAGES,
    BodyTimeout,
    BodyTooLarge,
    OriginRefused,
    error_response,
    internal_error,
    is_below,
)
from bdh_batch.http.request.content import check_file, check_type, decoded
from bdh_batch.http.states.endpoints import CONTENT
from bdh_batch.http.states.transfer import too_large
from bdh_batch.http.transport.budgets import Occasionally
from bdh_batch.http.transport.exchange import HOLD
from bdh_batch.observability.access import Account
from bdh_batch.observability.metrics import Metrics

if TYPE_CHECKING:
    from bdh_batch.observability.spans import RequestSpan, Spans

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
TRACE_HEADERS = ("traceparent", "tracestate")
# Asked for again and again, and never of the model.
PROBED = Paths(each.path for each in ENDPOINTS if each.open is not None)


def sane_id(*given: str) -> str:
    """The first id of a request that is sane, of those that its client gives it, or else a new one."""
    return next((each for each in given if REQUEST_ID.fullmatch(each)), None) or uuid4().hex


class RequestContext:
    """Outermost: gives the request an id (the client's, if it sent a sane one), counts and logs it, handles faults."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route], spans: Spans | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._templates = [(route.path_regex, route.path.replace(":path}", "}")) for route in routes]
        self._known_paths = frozenset(path for _, path in self._templates)
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = sane_id(Headers(scope=scope).get("x-request-id", ""))
        span = None if self._spans is None else self._begin(self._spans, scope, request_id)
        cleanup, account = contextlib.ExitStack(), Account(request_id)
        scope.setdefault("state", {}).update(id=request_id, span=span, cleanup=cleanup, account=account)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                account.responding()
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_below(MESSAGES, scope["path"]):
                    headers["request-id"] = request_id
                headers["openai-processing-ms"] = str(math.ceil(account.seconds * 1000))
            await send(message)

        with self._metrics.http_in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = 499  # as nginx counts them
            except Exception:
                fields = {"fields": {"request_id": request_id}}
                log.exception("request %s to %s failed", request_id, scope["path"], extra=fields)
                if status == 0:
                    await internal_error()(scope, receive, send_with_id)
            finally:
                cleanup.close()
                if (caller := scope["state"].get("caller")) is not None:
                    account.tenant = caller.label
                scope["state"].clear()  # what is in it knows the connection, which knows the scope: a circle
                route = self._route(scope)
                self._metrics.http_requests.labels(route, status).inc()
                if span is not None:
                    span.end(route, status)
                account.end(scope["method"], route, status, logging.DEBUG if scope["path"] in PROBED else logging.INFO)

    @staticmethod
    def _begin(spans: Spans, scope: Scope, request_id: str) -> RequestSpan | None:
        if scope["path"] in PROBED:
            return None
        headers = Headers(scope=scope)
        # Several of a name are one, as HTTP has it: several parents are then none.
        trace_headers = {name: ",".join(headers.getlist(name)) for name in TRACE_HEADERS}
        return spans.begin(request_id, scope["method"], trace_headers)

    def _route(self, scope: Scope) -> str:
        """A label of few values, whatever paths clients try."""
        path = scope["path"]
        if path in self._known_paths:
            return str(path)
        return next((template for known, template in self._templates if known.match(path)), "other")


def is_file(scope: Scope) -> bool:
    """Whether the body is a file, and no JSON."""
    return str(scope["path"]) == CONTENT


class BodyLimit:
    """Bounds the body of a request, and looks at what it is, once it is read.

    Args:
        most: bytes, also once decompressed.
        seconds: in which so many have to be there.
        origins: web pages that may call.
        most_of_file: bytes, where the body is a file.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float, origins: Collection[str], most_of_file: int) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds
        self._origins = origins
        self._most_of_file = most_of_file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        most = self._most_of_file if is_file(scope) else self._most
        if length.isdecimal() and int(length) > most:
            await error_response(self._too_large(scope))(scope, receive, send)
            return
        await self._app(scope, _Body(self, scope, receive), send)

    def open(self, scope: Scope, receive: Receive) -> Receive:
        """What a body is received by, from now on. Raises UnsupportedMedia."""
        headers = Headers(scope=scope)
        timed = self._bounded(scope, self._timed(receive))
        if is_file(scope):
            check_file(headers, self._origins)
            return timed
        check_type(headers, self._origins)
        inner = decoded(timed, headers, scope[HOLD])
        return timed if inner is timed else self._bounded(scope, inner)

    def _timed(self, receive: Receive) -> Receive:
        began, received = asyncio.get_running_loop().time(), 0

        async def timed() -> Message:
            nonlocal received
            try:
                async with asyncio.timeout_at(began + self._seconds * (1 + received // self._most)):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeout(
                    f"A request body should be there within {self._seconds:g} seconds (limits.body_seconds)."
                ) from None
            received += len(message.get("body", b""))
            return message

        return timed

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        received, most = 0, self._most_of_file if is_file(scope) else self._most

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise self._too_large(scope)
            return message

        return bounded

    def _too_large(self, scope: Scope) -> BodyTooLarge:
        if is_file(scope):
            return too_large(self._most_of_file)
        return BodyTooLarge(f"The request body exceeds the limit of {self._most} bytes (limits.max_body_bytes).")


class _Body:
    """Receives a request's body within its limits, and after it whether the client leaves."""

    def __init__(self, limit: BodyLimit, scope: Scope, receive: Receive) -> None:
        self._limit = limit
        self._scope = scope
        self._receive = receive
        self._inner: Receive | None = None
        self._more = True

    async def __call__(self) -> Message:
        if not self._more:  # the client has nothing to say but that it leaves
            return await self._receive()
        if self._inner is None:
            self._inner = self._limit.open(self._scope, self._receive)
        message = await self._inner()
        self._more = message.get("more_body", False)
        return message


class Origins(CORSMiddleware):
    """Which web pages may call. A refused preflight has the error body that every refusal has."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            allow_credentials="*" not in origins,  # what any page may ask is nobody's in particular
            expose_headers=["x-request-id", "request-id", "openai-processing-ms", "retry-after", *HEADERS],
        )
        self._warnings = Occasionally()

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin = request_headers["origin"]
        if self.is_allowed_origin(origin):
            text = f"{bytes(response.body).decode()}."
        else:
            text = f"Web pages of {origin} may not call this server: server.cors_origins does not list their origin."
            self._warnings.warn("a web page of %r was refused; server.cors_origins can list its origin", origin[:100])
        refusal = error_response(OriginRefused(text))
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        refusal.headers.update(kept)
        return refusal
