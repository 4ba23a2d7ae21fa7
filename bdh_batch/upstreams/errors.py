"""What clients are told of an upstream's faults: which upstream it was, and how it failed, but not where it is."""

from __future__ import annotations

from bdh_batch.errors import BDHError, InvalidRequest, Unavailable, UpstreamFailed, UpstreamLacksModel, UpstreamTimeout
from bdh_batch.upstreams.config import Upstream
from bdh_batch.upstreams.protocol import TIMEOUTS, Fault, FaultKind

LONGEST_MESSAGE = 500  # characters of an upstream's own words

TEXTS = {
    FaultKind.CONNECT: "cannot be reached",
    FaultKind.CONNECT_TIMEOUT: "did not accept a connection in time",
    FaultKind.FIRST_TOKEN_TIMEOUT: "did not begin in time",
    FaultKind.GAP_TIMEOUT: "did not go on in time",
    FaultKind.CLOSED: "ended the response before it was complete",
    FaultKind.MALFORMED: "sent what cannot be understood",
    FaultKind.TOO_LARGE: "sent more at once than upstreams.max_message_bytes",
    FaultKind.WRONG_REQUEST: "responded to another request",
    FaultKind.REWRITTEN: "changed text that had been sent already",
    FaultKind.DIFFERS: "was replaced by an endpoint that goes on differently",
    FaultKind.BUSY: "refuses requests at present",
    FaultKind.REFUSED: "refused the request",
    FaultKind.NOT_FOUND: "does not have",
    FaultKind.UNAUTHORIZED: "does not accept the key that it gets",
    FaultKind.ERROR: "failed",
}


def error_of(upstream: Upstream, fault: Fault, retry_after: int) -> BDHError:
    """Returns the error that a client gets for the fault that its request ended with."""
    if fault.kind is FaultKind.NOT_FOUND:
        text = f"The upstream {upstream.id!r} {TEXTS[fault.kind]} {upstream.target}."
        return UpstreamLacksModel(text, f"upstream_{fault.kind}")
    text = f"The upstream {upstream.id!r} {described(fault)}"
    if fault.kind is FaultKind.REFUSED:
        return InvalidRequest(text, fault.param, "upstream_refused")
    if fault.kind is FaultKind.BUSY:
        return Unavailable(text, retry_after)
    kind = UpstreamTimeout if fault.kind in TIMEOUTS else UpstreamFailed
    return kind(text, f"upstream_{fault.kind}")


def described(fault: Fault) -> str:
    """Returns what an endpoint did, as in "failed: status 500"."""
    return TEXTS[fault.kind] + (f": {brief(fault.message)}" if fault.message else ".")


def none_able(upstream: str, retry_after: int) -> Unavailable:
    """Returns the error for a request that no endpoint can be asked for."""
    return Unavailable(f"The upstream {upstream!r} is down: no endpoint of it can be asked.", retry_after)


def brief(message: str) -> str:
    """Returns an upstream's own words in one line, and not too many of them."""
    text = " ".join(message[: 2 * LONGEST_MESSAGE].split())
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
