"""What holds for every request, as plain ASGI: its id and its metrics, its body's size, its origin."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh_batch.http.access import DOCS, METRICS, PROBES
from bdh_batch.http.errors import BodyTimeout, BodyTooLarge, OriginRefused, error_response, internal_error
from bdh_batch.telemetry import Metrics

if TYPE_CHECKING:
    from bdh_batch.spans import RequestSpan, Spans

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
TRACE_HEADERS = ("traceparent", "tracestate")
WITHOUT_SPANS = PROBES | METRICS | DOCS  # asked for again and again, and never of the model


class RequestContext:
    """Outermost: gives the request an id (the client's, if it sent a sane one), counts it, answers for what fails."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known_paths: Iterable[str], spans: Spans | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._known_paths = frozenset(known_paths)
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        span = None if self._spans is None else self._begin(self._spans, scope, request_id)
        scope.setdefault("state", {}).update(id=request_id, span=span)
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
                if span is not None:
                    span.end(self._route(scope), status)

    @staticmethod
    def _begin(spans: Spans, scope: Scope, request_id: str) -> RequestSpan | None:
        if scope["path"] in WITHOUT_SPANS:
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
        return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


class BodyLimit:
    """Refuses a body over `most` bytes before it is read whole, and one that is not there after `seconds`."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = BodyTooLarge(f"A request body may have {self._most} bytes here (limits.max_body_bytes).")
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._most:
            await error_response(refusal)(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._seconds
        received, more = 0, True

        async def counted() -> Message:
            nonlocal received, more
            if not more:  # the client has nothing to say but that it leaves
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeout(
                    f"A request body should be there within {self._seconds:g} seconds (limits.body_seconds)."
                ) from None
            received += len(message.get("body", b""))
            if received > self._most:
                raise refusal
            more = message.get("more_body", False)
            return message

        await self._app(scope, counted, send)


class Origins(CORSMiddleware):
    """Which web pages may ask. A refused preflight has the error body that every refusal has."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        refusal = error_response(OriginRefused(f"{bytes(response.body).decode()}."))
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        refusal.headers.update(kept)
        return refusal
