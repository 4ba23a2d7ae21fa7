"""What can go wrong, by meaning. Knows nothing about HTTP.

BDHError
├── ConfigError            a setting that cannot be used: the program does not start
├── CheckpointError        a model that cannot be loaded: the program does not start
├── InvalidRequest         the request itself is at fault; `param` names the field
│   ├── UnknownParameter
│   ├── UnsupportedParameter
│   └── ContextLengthExceeded
├── ModelNotFound
├── QueueFull              too much waits already; `retry_after` seconds
│   └── TooLate                it would wait past its deadline
├── Unavailable            loading, draining, or the engine is down; `retry_after` seconds
├── DeadlineExceeded       a request's time was up
│   ├── QueueTimeout           while it waited
│   └── RunTimeout             while it ran
├── OutOfMemory            a step needed more memory than there is; another one may fit
└── GenerationFailed       a fault of ours ended this one request
    └── NotFinite          the model's scores of its next token were NaN or infinite
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_NAME = 128  # characters of a name that an error repeats


class BDHError(Exception):
    """The root of the tree."""

    @property
    def message(self) -> str:
        return str(self)


class ConfigError(BDHError):
    pass


class CheckpointError(BDHError):
    pass


class InvalidRequest(BDHError):
    """`param` is the path of the field at fault, as in `messages[2].content`, or None where it is the whole body."""

    code: str | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.code


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(BDHError):
    """`known` are the names that may be asked for instead."""

    def __init__(self, model: str, known: Sequence[str] = ()) -> None:
        names = ", ".join(repr(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…") for name in known)
        super().__init__(f"The model {model!r} does not exist here." + (f" There is {names}." if names else ""))


class RetryLater(BDHError):
    """Not now: the same request can succeed after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(RetryLater):
    pass


class TooLate(QueueFull):
    pass


class Unavailable(RetryLater):
    pass


class DeadlineExceeded(BDHError):
    pass


class QueueTimeout(DeadlineExceeded):
    pass


class RunTimeout(DeadlineExceeded):
    pass


class OutOfMemory(BDHError):
    pass


class GenerationFailed(BDHError):
    pass


class NotFinite(GenerationFailed):
    def __init__(self) -> None:
        super().__init__("The model gave a result that is not a finite number.")
