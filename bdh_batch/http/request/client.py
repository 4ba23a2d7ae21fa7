"""Clients of requests that are being served: who they are, and whether they still wait."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.auth.caller import Caller
from bdh_batch.messages import Origin
from bdh_batch.observability.access import Account

if TYPE_CHECKING:
    from bdh_batch.observability.spans import RequestSpan

T = TypeVar("T")

TIMEOUT_HEADER = "x-request-timeout"
LONGEST_TIMEOUT = 86400.0  # seconds


@dataclass(slots=True)
class Client:
    """Whoever waits for the response to one request, over HTTP or gRPC.

    Args:
        id: of the request.
        standing: where the caller stands in its rate limits, as headers; filled in as that becomes known.
        given_timeout: seconds from the request's arrival to its end, or what the client wrote for them.
        leaves: returns once the client has gone; None where the task that serves it is cancelled instead. The body
            must have been read.
        headers: by their names in lower case; over gRPC, the metadata.
        cleanup: is closed when the request has ended.
        account: what the request has taken, for the log.
    """

    id: str
    caller: Caller
    standing: dict[str, str]
    span: RequestSpan | None = None
    given_timeout: str | float | None = None
    leaves: Callable[[], Awaitable[None]] | None = None
    cleanup: ExitStack = field(default_factory=ExitStack)
    account: Account = field(default_factory=Account)
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request) -> Client:
        """The client of an HTTP request; the same one each time."""
        state = request.state
        if not hasattr(state, "client"):
            headers, leaves = request.headers, partial(left, request.receive)
            known = (state.id, state.caller, state.standing, state.span)
            timeout = headers.get(TIMEOUT_HEADER)
            state.client = cls(*known, timeout, leaves, state.cleanup, state.account, headers)
        client: Client = state.client
        return client

    @property
    def timeout(self) -> float | None:
        """Seconds. Raises InvalidRequest."""
        return parse_timeout(self.given_timeout)

    def origin(self) -> Origin:
        """What the scheduler is told of it. Raises InvalidRequest: its timeout is none."""
        caller = self.caller
        return Origin(self.id, caller.label, caller.weight, caller.namespace, self.timeout, self.span)


def parse_timeout(given: str | float | None) -> float | None:
    """The seconds that a client gives its request. Raises InvalidRequest."""
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT:
        text = f"{TIMEOUT_HEADER} should be seconds, more than 0 and at most {LONGEST_TIMEOUT:.0f}."
        raise InvalidRequest(text, TIMEOUT_HEADER)
    return seconds


async def unless_left(client: Client, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect
    """
    if client.leaves is None:
        return await work
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(client.leaves())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def left(receive: Receive) -> None:
    """Returns once the client of an HTTP request has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
