"""One choice of a request, from its first endpoint to its end: time-outs, other endpoints, stop strings."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from bdh_batch.backends.tokenization import off_the_loop
from bdh_batch.errors import BDHError
from bdh_batch.messages import UNKNOWN_TOKEN, Delta, FinishReason
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import Tokenizer
from bdh_batch.upstreams.config import Upstream
from bdh_batch.upstreams.continuation import Continuation
from bdh_batch.upstreams.counting import TokenCount, encoded_length
from bdh_batch.upstreams.endpoints import Endpoint, Endpoints, Observer
from bdh_batch.upstreams.errors import brief, error_of, none_able
from bdh_batch.upstreams.protocol import FINAL, Connector, Fault, FaultKind, Piece, TextRequest

log = logging.getLogger(__name__)

BACKLOG = 64  # deltas that wait for a slow reader; then the upstream waits
LAST_WORDS_SECONDS = 5.0  # from the finish reason to the end of the upstream's response, which has the usage


class Outbox:
    """The deltas of one request's choices, until they are read. A writer waits while too many do."""

    def __init__(self) -> None:
        self._deltas: deque[tuple[int, Delta]] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def put(self, index: int, delta: Delta) -> None:
        await self._room.wait()
        self.add(index, delta)

    def add(self, index: int, delta: Delta) -> None:
        """Adds one without waiting: the last of a choice."""
        self._deltas.append((index, delta))
        self._arrived.set()
        if len(self._deltas) >= BACKLOG:
            self._room.clear()

    async def take(self) -> list[tuple[int, Delta]]:
        """Waits for deltas, and returns all that there are."""
        await self._arrived.wait()
        taken = [*self._deltas]
        self._deltas.clear()
        self._arrived.clear()
        self._room.set()
        return taken


@dataclass(frozen=True, slots=True)
class Route:
    """Where the requests to one upstream go."""

    upstream: Upstream
    connector: Connector
    endpoints: Endpoints
    observer: Observer


class Choice:
    """One choice: what its endpoint sends goes into the outbox as deltas.

    Args:
        text: cuts the text at stop strings.
        seed: that a server like this one gets where the request has none, so that another one could go on.
        tokenizer: to count tokens with that the upstream does not count; None estimates them.
    """

    def __init__(
        self,
        index: int,
        request: TextRequest,
        route: Route,
        outbox: Outbox,
        text: TextStream,
        seed: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.count = TokenCount()
        self.prompt_tokens: int | None = None  # as the upstream reports them
        self.prompt_estimated = False  # whether it says that it has estimated them
        self.cached_tokens = 0
        self.outcome = ""  # its finish reason, or how it failed; empty while it runs
        self._said: list[str] = []  # the text, in pieces, where it is to be counted
        self.index = index
        self._request = request
        self._route = route
        self._outbox = outbox
        self._text = text
        self._seed = seed
        self._tokenizer = tokenizer
        self._record: Continuation | None = None  # where another endpoint could go on
        self._fingerprint: str | None = None  # which that has to have
        self._begun = False  # whether the client may have had something
        self._length = 0  # of all that it was sent, in characters
        self._reason: FinishReason | None = None
        self._stop: str | None = None  # the stop string that the upstream says has ended it
        self._started = time.monotonic()

    async def run(self) -> None:
        """Reads the upstream to the end of the choice; an error is its last delta."""
        try:
            await self._read()
        except Fault as fault:
            route = self._route
            self.fail(error_of(route.upstream, fault, route.endpoints.retry_after))
        except BDHError as error:
            self.fail(error)

    @property
    def ended(self) -> bool:
        return bool(self.outcome)

    def fail(self, error: BDHError) -> None:
        """Ends it with an error, unless it has ended."""
        if not self.ended:
            self._end(Delta(finish_reason=FinishReason.ERROR, error=error))

    def abort(self) -> None:
        """Ends it, unless it has ended, as nobody needs it any more."""
        if not self.ended:
            self._end(Delta(finish_reason=FinishReason.ABORT))

    def _end(self, last: Delta) -> None:
        assert last.finish_reason is not None
        self.outcome = last.finish_reason
        self._outbox.add(self.index, last)

    async def _read(self) -> None:
        """Asks one endpoint after the other. Raises the Fault of the last one."""
        endpoints = self._route.endpoints
        failed: list[Endpoint] = []
        last: Fault | None = None
        while True:
            endpoint = endpoints.choose(failed, self._fingerprint if self._begun else None)
            if endpoint is None:
                raise last or none_able(self._route.upstream.id, endpoints.retry_after)
            if last is not None:
                self._route.observer.went_elsewhere(self._route.upstream.id, self._begun)
            try:
                with endpoints.asking(endpoint):
                    await self._read_from(endpoint, failed)
                return
            except Fault as fault:
                if fault.kind is FaultKind.DIFFERS and self._record is not None and self._record.start_over():
                    continue
                self._log(endpoint, fault)
                if not self._may_go_elsewhere(fault, len(failed)):
                    raise
                last = fault
                failed.append(endpoint)

    def _may_go_elsewhere(self, fault: Fault, lost: int) -> bool:
        if fault.kind in FINAL or lost >= self._route.upstream.max_failovers:
            return False
        return not self._begun or (self._record is not None and self._record.possible)

    async def _request_for(self, endpoint: Endpoint) -> TextRequest:
        """Returns what an endpoint is asked: to go on, where another one like it has begun. Raises Fault."""
        facts = endpoint.facts
        if not self._begun:
            self._record, self._fingerprint = None, facts.fingerprint
        if facts.fingerprint is None:
            return replace(self._request, ours=facts.ours)
        if self._record is None:
            fields = {"seed": self._seed, **self._request.fields}
            self._record = Continuation(replace(self._request, fields=fields, ours=True, continuable=True))
            return self._record.request
        if self._record.lacks_prompt:
            asked = self._record.request
            self._record.know_prompt(await self._route.connector.prompt_ids(endpoint.address, asked))
        return self._record.next_request()

    async def _read_from(self, endpoint: Endpoint, failed: list[Endpoint]) -> None:
        request = await self._request_for(endpoint)
        record = self._record
        stream = self._route.connector.stream(endpoint.address, request)
        async with aclosing(stream) as source, aclosing(self._in_time(source)) as pieces:
            async for piece in pieces:
                if record is not None:
                    piece = record.take(piece)
                if piece.text or piece.extras or piece.finish_reason:
                    if not self._begun:
                        self._route.observer.answered(self._route.upstream.id, time.monotonic() - self._started)
                    self._route.endpoints.succeeded(endpoint)
                    failed.clear()
                if await self._take(piece):
                    break
        if self._reason is None:
            raise Fault(FaultKind.CLOSED)
        await self._finish()

    async def _in_time(self, source: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """Yields the pieces of `source`. Raises Fault where the next that has something takes too long."""
        chosen, now = self._route.upstream, asyncio.get_running_loop().time
        deadline, kind = now() + chosen.connect_seconds + chosen.first_token_seconds, FaultKind.FIRST_TOKEN_TIMEOUT
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(source, None)
            except TimeoutError:
                if self._reason is not None:
                    return
                raise Fault(kind) from None
            except Fault:
                if self._reason is not None:  # the text is complete; what is missing is the usage
                    return
                raise
            if piece is None:
                return
            had_ended = self._reason is not None
            yield piece
            if self._reason is not None:
                deadline = deadline if had_ended else now() + min(chosen.gap_seconds, LAST_WORDS_SECONDS)
            elif piece.text or piece.tokens or piece.count or piece.extras:
                deadline, kind = now() + chosen.gap_seconds, FaultKind.GAP_TIMEOUT

    async def _take(self, piece: Piece) -> bool:
        """Sends a piece on. Returns whether nothing more is wanted."""
        if self._reason is not None:  # after the end, only usage is of interest
            self._report(piece)
            return False
        self._length += len(piece.text) + (0 if piece.extras is None else len(repr(piece.extras)))
        if self._length > self._route.upstream.max_response_bytes:
            raise Fault(FaultKind.TOO_LARGE)
        text = self._text.add(piece.text) if piece.text else ""
        new = self.count.add(piece.text, piece.count)
        self._report(piece)
        self._begun = self._begun or bool(piece.text or new or piece.extras)
        if text or new or piece.extras:
            if self._tokenizer is not None:
                self._said.append(text)
            tokens = [*piece.tokens] if len(piece.tokens) == new else [UNKNOWN_TOKEN] * new
            extras = None if piece.extras is None else [piece.extras]
            await self._outbox.put(self.index, Delta(text, tokens, extras=extras))
        self._reason = FinishReason.STOP if self._text.stopped else piece.finish_reason
        self._stop = piece.stop
        return self._text.stopped

    def _report(self, piece: Piece) -> None:
        if piece.prompt_tokens is not None and self.prompt_tokens is None:
            known = None if self._record is None else self._record.prompt_tokens
            self.prompt_tokens = piece.prompt_tokens if known is None else known
            self.prompt_estimated = piece.estimated and known is None
            self.cached_tokens = min(piece.cached_tokens, self.prompt_tokens)
        if piece.completion_tokens is not None and self._record is None:
            self.count.report(piece.completion_tokens, piece.estimated)

    async def _finish(self) -> None:
        rest = self._text.flush()
        if self._tokenizer is not None and self.count.estimated:
            text = "".join([*self._said, rest])
            self.count.report(await off_the_loop(len(text), encoded_length, self._tokenizer, text, False))
        assert self._reason is not None
        self.outcome = self._reason
        stop = self._text.found or self._stop
        self._outbox.add(self.index, Delta(rest, finish_reason=self._reason, stop=stop))

    def _log(self, endpoint: Endpoint, fault: Fault) -> None:
        upstream = self._route.upstream.id
        self._route.observer.failed(upstream, fault.kind)
        cause = f" ({brief(repr(fault.__cause__))})" if fault.__cause__ is not None else ""
        refused = fault.kind is FaultKind.REFUSED  # by the client's doing, as often as it likes
        log.log(
            logging.INFO if refused else logging.WARNING,
            "upstream %s: %s: %s %s%s; request %s",
            upstream,
            endpoint.address,
            fault.kind,
            "" if refused else brief(fault.message),  # a refusal may quote the request
            cause,
            self._request.id,
        )
