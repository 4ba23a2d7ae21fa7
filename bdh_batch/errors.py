"""Every error of the server below its HTTP layer, by meaning. Knows nothing about HTTP.

`http/errors.py` maps them to responses, and adds those that only HTTP knows. Statuses:

BDHError
├── ConfigError                   -  a setting cannot be used: the program does not start
│   └── NotEnoughMemory           -  a model, or one state, does not fit the memory that is free
├── CheckpointError               -  a model cannot be loaded: the program does not start
├── InvalidRequest              400  the request itself is invalid; `param` names the field
│   ├── UnknownParameter        400  a field that no API has
│   ├── UnsupportedParameter    400  a field or value that this server or model does not support
│   └── ContextLengthExceeded   400  the prompt, with `max_tokens`, does not fit the model's context
├── ModelNotFound               404  `model` is not served here
├── ModelInUse                  409  a model that is to be unloaded is still in use
├── RetryLater                    -  the base of those that can succeed after `retry_after` seconds
│   ├── QueueFull               429  the queue is at its limit
│   │   └── TooLate             429  the estimated wait is longer than the request's timeout
│   └── Unavailable             503  the server is loading or draining, or the engine is down
├── DeadlineExceeded              -  the base of timeouts
│   ├── QueueTimeout            408  the request timed out while it waited in the queue
│   └── RunTimeout              504  the request timed out while it ran
├── UpstreamFailed              502  an upstream server failed, and no other could take over
│   ├── UpstreamTimeout         504  an upstream server was too slow
│   └── UpstreamLacksModel      404  an upstream server does not have the model that it is asked for
├── StoreFailed                 500  the store of responses and states cannot be read or written
│   └── StoreFull               507  what is to be stored does not fit the store's limits
├── OutOfMemory                 500  a step needed more memory than there is; a smaller one may fit
└── GenerationFailed            500  an internal fault ended this one request
    └── NotFinite               500  the model's logits were NaN or infinite
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_NAME = 128  # characters of a name that an error repeats


class BDHError(Exception):
    """The base of all errors that the server raises."""

    @property
    def message(self) -> str:
        return str(self)


class ConfigError(BDHError):
    """A setting cannot be used. Raised while the program starts, which then ends; it has no HTTP status."""


class NotEnoughMemory(ConfigError):
    """The model, or the memory for one state, does not fit what is free. Where models are loaded on demand, another one
    that is not in use is unloaded then."""


class CheckpointError(BDHError):
    """A model cannot be loaded. Raised while the program starts, which then ends; it has no HTTP status."""


class InvalidRequest(BDHError):
    """400: the request itself is invalid. Raised while a request is parsed, tokenized or constrained.

    `param` is the path of the field at fault, as in `messages[2].content`, or None where it is the whole body.
    """

    code: str | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code


class UnknownParameter(InvalidRequest):
    """400: raised for a field of the body that is not known, unless `api.unknown_fields` is `ignore`."""

    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    """400: raised for a field or a value that is valid in other APIs and not supported here."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """400: raised where a prompt, with `max_tokens`, exceeds the model's context or `limits.max_prompt_tokens`."""

    code = "context_length_exceeded"


class ModelNotFound(BDHError):
    """404: raised where a request names a model that is not served here.

    `known` are the names that the error lists.
    """

    def __init__(self, model: str, known: Sequence[str] = ()) -> None:
        names = ", ".join(repr(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…") for name in known)
        super().__init__(f"The model {model!r} does not exist." + (f" Available: {names}." if names else ""))


class ModelInUse(BDHError):
    """409: raised where a model that is to be unloaded still has requests when the time for its drain is over."""


class RetryLater(BDHError):
    """The base of errors after which the same request can succeed in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(RetryLater):
    """429: raised where a queue has no room for one more request."""


class TooLate(QueueFull):
    """429: raised where a request would wait past its timeout, by the estimate made when it arrives."""


class Unavailable(RetryLater):
    """503: raised while the server loads or drains, or when the engine is down."""


class DeadlineExceeded(BDHError):
    """The base of the timeouts of a request."""


class QueueTimeout(DeadlineExceeded):
    """408: raised for a request that times out while it waits in the queue."""


class RunTimeout(DeadlineExceeded):
    """504: raised for a request that times out while it runs."""


class UpstreamFailed(BDHError):
    """502: ends a request whose upstream server failed, where no other could take over.

    `code` says how it failed, as in `upstream_closed`.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class UpstreamTimeout(UpstreamFailed):
    """504: ends a request whose upstream server did not connect, begin or go on in time."""


class UpstreamLacksModel(UpstreamFailed):
    """404: ends a request whose upstream server does not have what the settings name: a model, or an endpoint."""

    param = "model"


class StoreFailed(BDHError):
    """500: raised where the store cannot read or write. A request that could do without it says `store: false`."""


class StoreFull(StoreFailed):
    """507: raised where one record or state is larger than the store, or the caller's part of it, may be."""


class OutOfMemory(BDHError):
    """500: raised where a step needs more memory than there is; the engine retries with less."""


class GenerationFailed(BDHError):
    """500: ends a request that an internal fault keeps from being completed."""


class NotFinite(GenerationFailed):
    """500: ends a request for which the model's logits are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__("The model's output contains NaN or infinite values.")
