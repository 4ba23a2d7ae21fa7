"""Maps errors to gRPC statuses: each error has the HTTP status that it has over REST, and that has one of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grpc import StatusCode

from bdh_batch.errors import BDHError, RetryLater
from bdh_batch.http.errors import describe

CODES: Mapping[int, StatusCode] = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    409: StatusCode.FAILED_PRECONDITION,
    413: StatusCode.RESOURCE_EXHAUSTED,
    415: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    431: StatusCode.RESOURCE_EXHAUSTED,
    499: StatusCode.CANCELLED,
    500: StatusCode.INTERNAL,
    503: StatusCode.UNAVAILABLE,
    502: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
    507: StatusCode.RESOURCE_EXHAUSTED,
}
CANCELLED = 499  # as HTTP's metrics have it
LONGEST_MESSAGE = 2048  # bytes: clients take 8 KiB of trailers, in which a byte may take three
FAULT = "Internal server error. The server's log has the reason under this request's id."


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told of an error.

    Args:
        status: HTTP's.
        trailers: metadata that say it to programs.
    """

    status: int
    message: str
    trailers: tuple[tuple[str, str], ...] = ()

    @property
    def code(self) -> StatusCode:
        return CODES[self.status]

    @classmethod
    def of(cls, error: BDHError) -> Refusal:
        status, body = describe(error)
        told = body["error"]
        message, param = str(told["message"]), told["param"]
        if param and param not in message:
            message = f"{param}: {message}"
        encoded = message.encode(errors="replace")
        if len(encoded) > LONGEST_MESSAGE:
            message = f"{encoded[:LONGEST_MESSAGE].decode(errors='ignore')}…"
        trailers = [("error-param", param), ("error-code", told["code"])]
        if isinstance(error, RetryLater):
            trailers.append(("retry-after", str(error.retry_after)))
        return cls(status, message, tuple((name, value) for name, value in trailers if _is_plain(value)))


def _is_plain(value: str | None) -> bool:
    """Whether it can be the value of metadata."""
    return bool(value) and value is not None and len(value) <= 256 and value.isascii() and value.isprintable()
