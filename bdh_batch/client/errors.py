"""Errors of the client, by meaning. Each error's `__cause__` is the `openai` client's own.

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
├── DeadlineExceeded       the request timed out
│   ├── QueueTimeout           while it waited
│   └── RunTimeout             while it ran
├── ServerFailed           a fault of the server's; its log has the reason under `request_id`
└── Unreachable            no response came
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from openai import APIConnectionError, APIError, APIStatusError


class ClientError(Exception):
    """The base of all errors that the client raises.

    Attributes:
        status: of HTTP; None where none came, as with an error that ends a stream.
        code, param: as in the error's body, or None.
        request_id: under which the server's log has the request, or None where no response came.
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
    """400: the request itself is invalid; `param` names the field."""


class UnknownParameter(InvalidRequest):
    """400: a field that the server does not know."""


class UnsupportedParameter(InvalidRequest):
    """400: a field or value that the server or its model does not support."""


class ContextLengthExceeded(InvalidRequest):
    """400: the prompt, with `max_tokens`, does not fit the model's context."""


class Unauthorized(ClientError):
    """401: no API key, or a wrong one."""


class Forbidden(ClientError):
    """403: the API key does not allow it."""


class NotFound(ClientError):
    """404: the path does not exist."""


class ModelNotFound(NotFound):
    """404: the model does not exist."""


class TooLarge(ClientError):
    """413 or 431: the body or the headers are too large."""


class RetryLater(ClientError):
    """The base of errors after which the same request can succeed in `retry_after` seconds."""


class RateLimited(RetryLater):
    """429: this API key or address has used up its rate limit."""


class QueueFull(RetryLater):
    """429: the queue is full."""


class Unavailable(RetryLater):
    """503: the server loads or drains, or its engine is down."""


class DeadlineExceeded(ClientError):
    """The base of timeouts: the request timed out."""


class QueueTimeout(DeadlineExceeded):
    """408: the request timed out while it waited in the queue."""


class RunTimeout(DeadlineExceeded):
    """504: the request timed out while it ran."""


class ServerFailed(ClientError):
    """500: an internal fault of the server; its log has the reason under `request_id`."""


class Unreachable(ClientError):
    """No response came."""


# The first that decides: the code, then the type of the body, then the status where a proxy answered without one.
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
    """Raises what the `openai` client raises inside, while it sends, as the ClientError that it means."""
    try:
        yield
    except APIError as error:
        raise translated(error) from error
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise ServerFailed(f"The response is not valid JSON: {error}.") from error
    except ValueError as error:  # NaN, or half of a surrogate pair
        raise InvalidRequest(f"The request cannot be sent as JSON: {error}.") from error


@contextmanager
def reading() -> Iterator[None]:
    """As `meaning`, while a response is read: what is wrong then is the server's fault."""
    try:
        yield
    except APIError as error:
        raise translated(error) from error
    except ValueError as error:
        raise ServerFailed(f"The response cannot be read: {error}.") from error


def translated(error: APIError) -> ClientError:
    if isinstance(error, APIConnectionError):
        cause = error.__cause__ or "no response"
        return Unreachable(f"{error.message.rstrip('.')}: {shown(str(error.request.url))} ({cause})")
    status, request_id, retry_after = None, None, None
    if isinstance(error, APIStatusError):
        status, request_id = error.status_code, error.request_id
        retry_after = _seconds(error.response.headers.get("retry-after", ""))
    kind = BY_CODE.get(error.code) or BY_TYPE.get(error.type) or BY_STATUS.get(status, ServerFailed)
    message = error.body["message"] if isinstance(error.body, dict) and "message" in error.body else error.message
    return kind(
        message, status=status, code=error.code, param=error.param, request_id=request_id, retry_after=retry_after
    )


def shown(url: str) -> str:
    """The scheme, host, port and path of a URL: no user, no password, no query."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}" if rest else scheme.rpartition("@")[2]


def _seconds(value: str) -> float | None:
    """None for the other syntax of Retry-After, a date, which this server never sends."""
    return float(value) if value.isdecimal() else None
