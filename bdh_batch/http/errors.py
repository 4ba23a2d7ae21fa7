"""Maps errors to responses: status, OpenAI's error body, headers. Adds the errors that only HTTP knows.

BDHError
├── InvalidHTTP            400  the bytes are not a valid HTTP/1.1 request
├── InvalidCoding          400  the body cannot be decoded by its Content-Encoding
├── OriginRefused          400  a preflight from an origin that is not allowed
├── Unauthorized           401  no API key, or a wrong one
├── Forbidden              403  the API key does not allow it
├── NotFound               404  a response or an item that is not there
├── HostRefused            403  a Host header that is not allowed
├── HeaderTimeout          408  the headers did not arrive in time
├── BodyTimeout            408  the body did not arrive in time
├── WriteTimeout           408  the client does not take its response
├── BodyTooLarge           413  the body is too large
├── UnsupportedMedia       415  the body is not JSON, or its coding is not supported
├── HeadersTooLarge        431  the headers are too large
└── RetryLater
    ├── RateLimited        429  the caller's requests or tokens per minute are used up
    └── TooManyConnections 429  one address has too many connections open
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from bdh_batch.errors import (
    BDHError,
    DeadlineExceeded,
    InvalidRequest,
    ModelInUse,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    RetryLater,
    RunTimeout,
    StoreFailed,
    StoreFull,
    TooLate,
    Unavailable,
    UnsupportedParameter,
    UpstreamFailed,
    UpstreamLacksModel,
    UpstreamTimeout,
)

REPEATED_SLASHES = re.compile("//+")
LONGEST_PATH = 128  # characters of one that an error repeats, and that are compared with those there are
SIMILAR = 0.7
KSERVE, MESSAGES = "/v2", "/v1/messages"  # and all paths below them
MAIN_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models")
LONGEST_MESSAGE = 8192  # characters: an error may repeat what a client sent, but not all of it
ACCEPTED_CODINGS = "gzip, deflate, identity"
CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "internal_error",
    502: "upstream_error",
    503: "service_unavailable",
    504: "timeout_error",
    507: "insufficient_storage",
}
# Of Anthropic's API; of other statuses below 500 it is a request that is not valid.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# The tool runners of Anthropic's clients ask for a thread, and go on without it where the error has these details.
NO_THREAD = {"details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}}


class Unauthorized(BDHError):
    """401: the request carries no API key, or a wrong one."""


class Forbidden(BDHError):
    """403: the API key does not allow what the request asks for.

    `param` is the field that asks for it.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class NotFound(BDHError):
    """404: a response, or an item of one, that is not there, not any more, or somebody else's.

    `param` is the field that names it, if one does.
    """

    def __init__(self, message: str, param: str | None, code: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidHTTP(BDHError):
    """400: the bytes are not a valid HTTP/1.1 request."""


class HeadersTooLarge(BDHError):
    """431: the request line and headers exceed `limits.max_header_bytes`."""


class HeaderTimeout(BDHError):
    """408: the headers did not arrive within `limits.header_seconds`."""


class BodyTooLarge(BDHError):
    """413: the body exceeds `limits.max_body_bytes`."""


class BodyTimeout(BDHError):
    """408: the body did not arrive within `limits.body_seconds`."""


class WriteTimeout(BDHError):
    """408: the client of a gRPC stream takes nothing of it for `limits.write_seconds`."""


class UnsupportedMedia(BDHError):
    """415: the Content-Type is not JSON, or the Content-Encoding is not supported."""


class InvalidCoding(BDHError):
    """400: the body cannot be decoded by its Content-Encoding."""


class OriginRefused(BDHError):
    """400: a CORS preflight from an origin that `server.cors_origins` does not list."""


class HostRefused(BDHError):
    """403: the Host header names a host that `server.allowed_hosts` does not list."""


class RateLimited(RetryLater):
    """429: the caller has used up its requests or tokens per minute."""


class TooManyConnections(RetryLater):
    """429: one address has too many connections open."""


STATUS: dict[type[BDHError], tuple[int, str | None]] = {
    Unauthorized: (401, "invalid_api_key"),
    Forbidden: (403, "permission_denied"),
    InvalidHTTP: (400, "invalid_http"),
    OriginRefused: (400, "origin_not_allowed"),
    HeadersTooLarge: (431, "headers_too_large"),
    HeaderTimeout: (408, "header_timeout"),
    BodyTimeout: (408, "body_timeout"),
    WriteTimeout: (408, "write_timeout"),
    UnsupportedMedia: (415, "unsupported_media_type"),
    InvalidCoding: (400, "invalid_content_encoding"),
    HostRefused: (403, "host_not_allowed"),
    ModelNotFound: (404, "model_not_found"),
    NotFound: (404, "not_found"),
    ModelInUse: (409, "model_in_use"),
    BodyTooLarge: (413, CODES[413]),
    QueueTimeout: (408, "queue_timeout"),
    RunTimeout: (504, "request_timeout"),
    QueueFull: (429, "queue_full"),
    TooLate: (429, "queue_full"),
    RateLimited: (429, "rate_limit_exceeded"),
    TooManyConnections: (429, "too_many_connections"),
    Unavailable: (503, "service_unavailable"),
    StoreFailed: (500, "store_failed"),
    StoreFull: (507, "store_full"),
    UpstreamFailed: (502, "upstream_failed"),
    UpstreamTimeout: (504, "upstream_timeout"),
    UpstreamLacksModel: (404, "upstream_not_found"),
}


def describe(error: BDHError) -> tuple[int, dict[str, Any]]:
    """The status and the body of the response that reports `error`."""
    if isinstance(error, InvalidRequest):
        return 400, _body(400, error.message, error.param, error.code)
    status, code = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), (500, None))
    param = "model" if isinstance(error, ModelNotFound) else getattr(error, "param", None)
    return status, _body(status, error.message, param, getattr(error, "code", code))


def error_response(error: BDHError) -> Response:
    """The response to a request that ended with `error`."""
    status, body = describe(error)
    response = ErrorResponse(status, body)
    if isinstance(error, RetryLater):
        response.headers["retry-after"] = str(error.retry_after)
    if isinstance(error, DeadlineExceeded):
        response.headers["x-should-retry"] = "false"  # OpenAI's clients would ask again on their own, past the deadline
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    if status == 415:
        response.headers["accept-encoding"] = ACCEPTED_CODINGS
    if isinstance(error, BodyTimeout):
        response.headers["connection"] = "close"
    return response


def internal_error() -> Response:
    return ErrorResponse(
        500, _body(500, "Internal server error. The server's log has the reason under this request's id.")
    )


async def handle_fault(request: Request, error: Exception) -> Response:
    return internal_error()


async def handle_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BDHError)
    return error_response(error)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown path, method that a path does not have."""
    assert isinstance(error, HTTPException)
    headers, message = dict(error.headers or {}), error.detail
    if error.status_code == 404:
        message = _nothing_at(request)
    elif error.status_code == 405:
        allowed = headers["Allow"] = ", ".join(_methods_at(request))
        message = f"Method {request.method} is not allowed for {request.url.path}; allowed: {allowed}."
    response = ErrorResponse(error.status_code, _body(error.status_code, message, None, CODES.get(error.status_code)))
    response.headers.update(headers)
    return response


def _methods_at(request: Request) -> list[str]:
    """All that its path has: each may have a route of its own."""
    fitting = (each for each in request.app.routes if each.matches(request.scope)[0] != Match.NONE)
    return sorted({method for each in fitting if isinstance(each, Route) for method in each.methods or ()})


def _nothing_at(request: Request) -> str:
    """Suggests the path that was meant (a /v1 or slashes too few or too many), else similar ones."""
    path: str = request.scope["path"]
    shown = path if len(path) <= LONGEST_PATH else f"{path[:LONGEST_PATH]}…"
    plain = REPEATED_SLASHES.sub("/", path).rstrip("/")
    for meant in (f"/v1{path}", path.removeprefix("/v1"), plain, f"/v1{plain}", plain.removeprefix("/v1")):
        scope = {**request.scope, "path": meant}
        if meant not in ("/", path) and any(route.matches(scope)[0] != Match.NONE for route in request.app.routes):
            return f"The path {shown} does not exist. Did you mean {meant}?"
    known = [route.path.replace(":path}", "}") for route in request.app.routes if isinstance(route, Route)]
    near = dict.fromkeys((*get_close_matches(path[:LONGEST_PATH], known, 3, SIMILAR), *MAIN_PATHS))
    return f"The path {shown} does not exist. Available: {', '.join(near)}; /openapi.json lists all."


def _body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error")
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorResponse(Response):
    """An error, in the shape of the API that was asked: OpenAI's, KServe's or Anthropic's."""

    media_type = "application/json"

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(orjson.dumps(body), status)
        self._error = body["error"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_below(KSERVE, scope["path"]):
            self._say(kserve_error(self._error))
        elif is_below(MESSAGES, scope["path"]):
            self._say(anthropic_error(self.status_code, self._error, scope["state"]["id"]))
        await super().__call__(scope, receive, send)

    def _say(self, body: dict[str, Any]) -> None:
        self.body = orjson.dumps(body)
        self.headers["content-length"] = str(len(self.body))


def is_below(root: str, path: str) -> bool:
    """Whether a path is `root`, or one below it."""
    return path == root or path.startswith(f"{root}/")


def kserve_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """The body of an error in KServe's API, from the object of OpenAI's."""
    return {"error": error["message"], **{name: error[name] for name in ("type", "param", "code")}}


def anthropic_error(status: int, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """The body of an error in Anthropic's API, from the object of OpenAI's; `param` and `code` are there, too."""
    kind = ANTHROPIC_TYPES.get(status, "invalid_request_error")
    refused = (error["code"], error["param"])
    details = NO_THREAD if refused == (UnsupportedParameter.code, "thread") else {}
    return {"type": "error", "error": {**error, "type": kind, **details}, "request_id": request_id}
