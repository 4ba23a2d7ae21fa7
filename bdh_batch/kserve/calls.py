"""What every gRPC call goes through: its id, its caller and key, its deadline, metrics and spans, and its errors."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, Protocol
from urllib.parse import unquote

from grpc import StatusCode, aio
from starlette.requests import ClientDisconnect

from bdh_batch.errors import BDHError, InvalidRequest, Unavailable
from bdh_batch.http.auth.caller import UNIX, Caller, at_address, key_in
from bdh_batch.http.errors import BodyTimeout, TooManyConnections
from bdh_batch.http.middleware import TRACE_HEADERS, sane_id
from bdh_batch.http.request.client import LONGEST_TIMEOUT, TIMEOUT_HEADER, Client, parse_timeout
from bdh_batch.http.serving import Serving
from bdh_batch.kserve.status import CANCELLED, FAULT, Refusal
from bdh_batch.observability.access import Account

log = logging.getLogger(__name__)

SOONEST = 0.001  # seconds: of a deadline that is over already
RETRY_SECONDS = 2
OVER = (aio.InternalError, aio.UsageError)  # what gRPC raises where a call has ended meanwhile
FINE = 200  # the status of what went well, in metrics, spans and the log
METHOD = "POST"  # of HTTP/2, which every call of gRPC is


class Context(Protocol):
    """The part of a call's context that is used here (`grpc.aio.ServicerContext`)."""

    def peer(self) -> str: ...
    def invocation_metadata(self) -> Any: ...
    def time_remaining(self) -> float | None: ...
    def set_trailing_metadata(self, metadata: Any) -> None: ...
    async def abort(self, code: StatusCode, details: str, trailing_metadata: Any) -> None: ...
    async def write(self, message: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Call:
    """A call: its context, the key that it carries, and whose it is by its address."""

    context: Context
    metadata: dict[str, list[str]]
    address: Caller

    @classmethod
    def of(cls, context: Context, proxies: list[str]) -> Call:
        metadata: dict[str, list[str]] = {}
        for name, value in context.invocation_metadata() or ():
            metadata.setdefault(name, []).append(value if isinstance(value, str) else value.decode("latin-1"))
        forwarded = ",".join(metadata.get("x-forwarded-for", ()))
        return cls(context, metadata, at_address(client_address(context.peer(), forwarded, proxies)))

    @property
    def key(self) -> str:
        return key_in(self.metadata.get("authorization", ()))

    def header(self, name: str) -> str | None:
        return self.metadata[name][0] if name in self.metadata else None

    async def write(self, response: bytes) -> None:
        """Sends a message of a stream. Raises CancelledError: the call was over already."""
        try:
            await self.context.write(response)
        except OVER:
            raise asyncio.CancelledError from None

    def is_over(self) -> bool:
        """Whether its deadline has come."""
        remaining = self.context.time_remaining()
        return remaining is not None and remaining <= SOONEST

    def timeout(self) -> float | None:
        """Seconds until its deadline, or as its metadata say. Raises InvalidRequest."""
        remaining = self.context.time_remaining()
        if remaining is not None and remaining > LONGEST_TIMEOUT:
            remaining = None
        given = [remaining, parse_timeout(self.header(TIMEOUT_HEADER))]
        return min((max(SOONEST, each) for each in given if each is not None), default=None)


@dataclass(slots=True)
class Request:
    """A request of a call, while it is served."""

    call: Call
    id: str
    span: Any
    account: Account
    standing: dict[str, str] = field(default_factory=dict)
    status: int = FINE
    client: Client | None = None


class Calls:
    """Has the calls of one server be served."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._limits = serving.settings.limits
        chosen = serving.settings.kserve
        self._most = chosen.max_calls
        self._each = chosen.max_calls_per_caller or max(1, chosen.max_calls // 2)
        self._under_way = 0
        self._by_caller: Counter[str] = Counter()
        self._held = 0

    def call(self, context: Context) -> Call:
        return Call.of(context, self._serving.settings.server.trusted_proxies)

    async def admit(self, request: Request) -> Client:
        """Counts a request, and returns its client; where that leaves, the task that serves it is cancelled.

        Raises:
            Unauthorized, RateLimited
            InvalidRequest: its timeout is none.
        """
        call = request.call
        caller = await self._serving.admission.admit(call.key, call.address, request.standing)
        headers = {name: values[0] for name, values in call.metadata.items()}
        known, request.account.tenant = (request.id, caller, request.standing, request.span), caller.label
        request.client = Client(*known, call.timeout(), account=request.account, headers=headers)
        return request.client

    @contextmanager
    def one_of(self, caller: Caller, probe: bool = False) -> Iterator[None]:
        """Counts a call of a caller. A `probe` is counted apart: it is let in where no other call is.

        Raises:
            Unavailable: there are too many in all.
            TooManyConnections: there are too many of this caller.
        """
        label = f"probes of {caller.label}" if probe else caller.label
        if self._under_way >= self._most and not probe:
            self._serving.metrics.refused("connections")
            text = f"Too many calls are under way; the limit is {self._most} (kserve.max_calls)."
            raise Unavailable(text, RETRY_SECONDS)
        if self._by_caller[label] >= self._each:
            self._serving.metrics.refused("connections_per_address")
            text = f"Too many of your calls are under way; the limit is {self._each} (kserve.max_calls_per_caller)."
            raise TooManyConnections(text, RETRY_SECONDS)
        self._under_way += not probe
        self._by_caller[label] += 1
        try:
            yield
        finally:
            self._under_way -= not probe
            self._by_caller[label] -= 1
            if not self._by_caller[label]:
                del self._by_caller[label]

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Counts the bytes of a message until it has been responded to. Raises Unavailable: they are too many."""
        if self._held + size > self._limits.max_buffered_bytes:
            self._serving.metrics.refused("buffered_bytes")
            text = f"The messages that are held exceed {self._limits.max_buffered_bytes} bytes"
            raise Unavailable(f"{text} (limits.max_buffered_bytes).", RETRY_SECONDS)
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    async def only_message(self, messages: AsyncIterator[bytes]) -> bytes:
        """The first message of a call. Raises BodyTimeout, InvalidRequest: it does not come, or there is none."""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for message in messages:
                    return message
        except TimeoutError:
            text = f"The message should be there within {self._limits.body_seconds:g} seconds (limits.body_seconds)."
            raise BodyTimeout(text) from None
        raise InvalidRequest("The call has no message.")

    @contextmanager
    def request(self, call: Call, route: str, *ids: str) -> Iterator[Request]:
        """Serves one request: with an id, in metrics, spans and the log. What it raises goes on as it is.

        Args:
            ids: that its client gives it; the first sane one is taken.
        """
        metrics, spans = self._serving.metrics, self._serving.spans
        id = sane_id(*ids)
        request = Request(call, id, None, Account(id, call.address.label))
        if spans is not None:
            trace = {name: ",".join(call.metadata.get(name, ())) for name in TRACE_HEADERS}
            request.span = spans.begin(request.id, METHOD, trace)
        with metrics.http_in_flight.track_inprogress():
            try:
                yield request
            except BaseException as error:
                request.status = self.refusal(error, request.id, route).status
                if isinstance(error, BDHError):
                    self._serving.count_refusal(error, request.client)
                raise
            finally:
                if request.client is not None:
                    request.client.cleanup.close()
                metrics.http_requests.labels(route, request.status).inc()
                if request.span is not None:
                    request.span.end(route, request.status)
                request.account.end(METHOD, route, request.status)

    def refusal(self, error: BaseException, id: str = "", route: str = "") -> Refusal:
        """What a client is told of an error. One that is no refusal is logged, where an id is given."""
        if isinstance(error, BDHError):
            return Refusal.of(error)
        if isinstance(error, asyncio.CancelledError | ClientDisconnect):
            return Refusal(CANCELLED, "The call was cancelled.")
        if id:
            log.error("request %s to %s failed", id, route, exc_info=error, extra={"fields": {"request_id": id}})
        return Refusal(500, FAULT)

    @asynccontextmanager
    async def ends(self, context: Context) -> AsyncIterator[list[tuple[str, str]]]:
        """Ends a call with the status of what is raised, and with the metadata that are put into the list."""
        trailers: list[tuple[str, str]] = []
        try:
            yield trailers
            context.set_trailing_metadata(tuple(trailers))
        except Exception as error:  # noqa: BLE001 - whoever serves it has logged what is no refusal
            refusal = self.refusal(error)
            await abort(context, refusal, trailers)


async def abort(context: Context, refusal: Refusal, trailers: Sequence[tuple[str, str]] = ()) -> None:
    """Ends a call with an error. Raises CancelledError: the call was over already, by its deadline or its client."""
    try:
        await context.abort(refusal.code, refusal.message, (*trailers, *refusal.trailers))
    except OVER:
        raise asyncio.CancelledError from None


def client_address(peer: str, forwarded: str, proxies: list[str]) -> str:
    """The address of a call's client.

    Args:
        peer: as gRPC has it: `ipv4:127.0.0.1:5000`, `ipv6:%5B::1%5D:5000`, `unix:`.
        forwarded: x-forwarded-for, which is believed of `proxies`.
    """
    kind, _, address = unquote(peer).partition(":")
    host = address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else UNIX
    hops = [host, *(hop.strip() for hop in reversed(forwarded.split(",")) if hop.strip())]
    return next((hop for hop in hops if not _is_among(hop, proxies)), hops[-1])


def _is_among(host: str, proxies: list[str]) -> bool:
    if host == UNIX:
        return UNIX in proxies
    try:
        known = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(known, "ipv4_mapped", None) or known
    return any(mapped in ip_network(text, strict=False) for text in proxies if text != UNIX)
