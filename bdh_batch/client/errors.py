"""What a client is told, by meaning. Each error's `__cause__` is the `openai` client's own.

ClientError
├── InvalidRequest         the request itself is at fault; `param` names the field
│   ├── UnknownParameter
│   ├── UnsupportedParameter
│   └── ContextLengthExceeded
├── Unauthorized           no key, or a wrong one
├── Forbidden              not with this key
├── NotFound               a path
│   └── ModelNotFound
├── TooLarge               the body or the headers
├── RetryLater             the same request can succeed after `retry_after` seconds
│   ├── RateLimited            this key or address has asked too often
│   ├── QueueFull              too much waits already
│   └── Unavailable            loading, draining, or the engine is down
├── DeadlineExceeded       the request's time was up
│   ├── QueueTimeout           while it waited
│   └── RunTimeout             while it ran
├── ServerFailed           a fault of the server's; its log has the reason under `request_id`
└── Unreachable            no answer came
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from openai import APIConnectionError, APIError, APIStatusError


class ClientError(Exception):
    """The root of the tree.

    Attributes:
        status: of HTTP; None where none came, as with an error that ends a stream.
        code, param: as in the error's body, or None.
        request_id: under which the server's log has the request, or None where no answer came.
        retry_after: seconds, or None where the server did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after


class InvalidRequest(ClientError):
    pass


class UnknownParameter(InvalidRequest):
    pass


class UnsupportedParameter(InvalidRequest):
    pass


class ContextLengthExceeded(InvalidRequest):
    pass


class Unauthorized(ClientError):
    pass


class Forbidden(ClientError):
    pass


class NotFound(ClientError):
    pass


class ModelNotFound(NotFound):
    pass


class TooLarge(ClientError):
    pass


class RetryLater(ClientError):
    pass


class RateLimited(RetryLater):
    pass


class QueueFull(RetryLater):
    pass


class Unavailable(RetryLater):
    pass


class DeadlineExceeded(ClientError):
    pass


class QueueTimeout(DeadlineExceeded):
    pass


class RunTimeout(DeadlineExceeded):
    pass


class ServerFailed(ClientError):
    pass


class Unreachable(ClientError):
    pass


# The first that tells decides: the code, then the type of the body, then the status where a proxy answered without one.
BY_CODE: dict[str | None, type[ClientError]] = {
    "unknown_parameter": UnknownParameter,
    "unsupported_parameter": UnsupportedParameter,
    "context_length_exceeded": ContextLengthExceeded,
    "model_not_found": ModelNotFound,
    "body_too_large": TooLarge,
    "headers_too_large": TooLarge,
    "queue_full": QueueFull,
    "queue_timeout": QueueTimeout,
    "request_timeout": RunTimeout,
}
BY_TYPE: dict[str | None, type[ClientError]] = {
    "invalid_request_error": InvalidRequest,
    "authentication_error": Unauthorized,
    "permission_error": Forbidden,
    "not_found_error": NotFound,
    "rate_limit_error": RateLimited,
    "timeout_error": DeadlineExceeded,
    "internal_error": ServerFailed,
    "service_unavailable": Unavailable,
}
BY_STATUS: dict[int | None, type[ClientError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    408: DeadlineExceeded,
    413: TooLarge,
    429: RateLimited,
    431: TooLarge,
    503: Unavailable,
    504: DeadlineExceeded,
}


@contextmanager
def meaning() -> Iterator[None]:
    """Raises what the `openai` client raises inside as the ClientError that it means."""
    try:
        yield
    except APIError as error:
        raise translated(error) from error


def translated(error: APIError) -> ClientError:
    if isinstance(error, APIConnectionError):
        return Unreachable(error.message)
    status, request_id, retry_after = None, None, None
    if isinstance(error, APIStatusError):
        status, request_id = error.status_code, error.request_id
        retry_after = _seconds(error.response.headers.get("retry-after", ""))
    kind = BY_CODE.get(error.code) or BY_TYPE.get(error.type) or BY_STATUS.get(status, ServerFailed)
    message = error.body["message"] if isinstance(error.body, dict) and "message" in error.body else error.message
    return kind(
        message, status=status, code=error.code, param=error.param, request_id=request_id, retry_after=retry_after
    )


def _seconds(value: str) -> float | None:
    """None for the other form of Retry-After, a date, which this server never sends."""
    return float(value) if value.isdecimal() else None
