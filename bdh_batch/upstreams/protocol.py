"""The interface of the kinds of upstreams: a request for one choice in, pieces of its text out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from bdh_batch.messages import FinishReason


class FaultKind(StrEnum):
    """How an upstream failed: the label of a metric, and, after `upstream_`, the code of an error."""

    CONNECT = "connect"  # no connection
    CONNECT_TIMEOUT = "connect_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"
    GAP_TIMEOUT = "gap_timeout"
    CLOSED = "closed"  # the connection, or the stream, ended before the response did
    MALFORMED = "malformed"  # bytes that are no message of its protocol
    TOO_LARGE = "too_large"
    WRONG_REQUEST = "wrong_request"  # a response to another request
    REWRITTEN = "rewritten"  # it took back what the client has
    DIFFERS = "differs"  # another endpoint did not go on as the one before would have
    BUSY = "busy"  # it refuses work at present
    REFUSED = "refused"  # it refuses this request
    NOT_FOUND = "not_found"  # it does not have the model, or the endpoint, that it is asked for
    UNAUTHORIZED = "unauthorized"  # it does not accept the key that it gets
    ERROR = "error"  # it reports an error of its own


# What a status of HTTP is about: the request, the model, the key or its account, or the time. Others, the server.
KINDS = {
    **dict.fromkeys((400, 413, 414, 422, 431, 451), FaultKind.REFUSED),
    **dict.fromkeys((404, 410), FaultKind.NOT_FOUND),
    **dict.fromkeys((401, 402, 403), FaultKind.UNAUTHORIZED),
    **dict.fromkeys((408, 425, 429, 503, 529), FaultKind.BUSY),
}
MOST = 2**31 - 1  # of what KServe passes on as INT32: numbers of tokens, and their ids
TIMEOUTS = frozenset((FaultKind.CONNECT_TIMEOUT, FaultKind.FIRST_TOKEN_TIMEOUT, FaultKind.GAP_TIMEOUT))
# Of these another endpoint would do no better.
FINAL = frozenset((FaultKind.REFUSED, FaultKind.REWRITTEN, FaultKind.DIFFERS))
# These may be the request's doing: one client's requests must not have an endpoint left alone by all.
INNOCENT = FINAL | {FaultKind.TOO_LARGE, FaultKind.ERROR, FaultKind.NOT_FOUND, FaultKind.UNAUTHORIZED}


class Fault(Exception):
    """Raised where an endpoint fails. Clients get an `UpstreamFailed`, or another error, with the upstream's name.

    Args:
        message: what the upstream said, if the client may know it; it is cut to some length.
        param: the field that it refuses.
        status: of the HTTP response that refuses the request.
    """

    def __init__(self, kind: FaultKind, message: str = "", param: str | None = None, status: int | None = None) -> None:
        super().__init__(kind, message, param)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param

    @property
    def blames_endpoint(self) -> bool:
        """Whether it says that the endpoint is not well, whatever it was asked."""
        return self.kind not in INNOCENT or (self.status or 0) >= 500


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A request for one choice.

    Args:
        prompt: a text or token ids; None with `messages`.
        fields: the other fields of the body, by their names in the API.
        headers: those that are passed on, beside those of the settings.
        ours: whether the endpoint is a server like this one.
        continuable: whether tokens' ids are wanted, as the stream may go on elsewhere.
    """

    id: str
    prompt: str | Sequence[int] | None
    messages: Sequence[Mapping[str, Any]] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    continuable: bool = False


@dataclass(slots=True)
class Piece:
    """What an upstream adds to a choice.

    Args:
        tokens: its token ids, where the upstream says them.
        count: how many tokens it is, where that is known; None is to be estimated.
        extras: members of a chat's delta, and log-probabilities, that go to the client as they are.
        prompt_tokens, completion_tokens, cached_tokens: of the choice, where the upstream reports its usage.
        estimated: whether it reports that these are estimates.
        prompt_ids: the token ids of the prompt, where the upstream says them.
        stop: the stop string that ended the choice, where the upstream says it.
    """

    text: str = ""
    tokens: Sequence[int] = ()
    count: int | None = None
    finish_reason: FinishReason | None = None
    extras: Mapping[str, Any] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    estimated: bool = False
    prompt_ids: Sequence[int] | None = None
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """What a health check has found out.

    Args:
        ours: whether it is a server like this one, which takes all fields.
        fingerprint: of its model, where it generates itself; endpoints with the same one generate the same.
    """

    ours: bool = False
    fingerprint: str | None = None


class Connector(Protocol):
    """Speaks the protocol of one upstream with its endpoints."""

    takes_messages: bool
    stops: bool  # whether the upstream is given `stop`; else texts are cut here

    def expresses(self, chat: bool, ours: bool) -> Collection[str] | None:
        """The fields of a request that the upstream can be given; None is all. `ours`: it is a server like this one."""

    def stream(self, address: str, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """Yields what comes; closing it cancels the request at the upstream. Ends without a `finish_reason` where the
        upstream did. Raises Fault."""

    async def probe(self, address: str) -> EndpointFacts:
        """Looks whether the endpoint can be asked. Raises Fault."""

    async def prompt_ids(self, address: str, request: TextRequest) -> Sequence[int] | None:
        """Returns the token ids of a prompt, as a server like this one says them; None where it has no way to. Raises
        Fault."""

    async def close(self) -> None:
        """Closes all connections. Idempotent."""


def token_ids(said: Sequence[int]) -> Sequence[int]:
    """Returns the same. Raises Fault: one of them is no token id."""
    if said and not (min(said) >= 0 and max(said) <= MOST):
        raise Fault(FaultKind.MALFORMED, "a token id is none")
    return said


REASONS = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "eos_token": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "end_turn": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
FAILED = frozenset(("error", "abort", "aborted", "cancelled"))


def reason_of(said: str) -> FinishReason:
    """Returns what an upstream's finish reason means. Raises Fault where it is that it failed."""
    if said in FAILED:
        raise Fault(FaultKind.ERROR, f"it ended with {said!r}")
    return REASONS.get(said, FinishReason.STOP)
