"""Upstreams that are Gradio apps, asked by Gradio's HTTP API: a POST begins an event, a stream of events follows it."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing

import httpx

from bdh_batch.backends.tokenization import off_the_loop
from bdh_batch.messages import FinishReason
from bdh_batch.upstreams.config import GradioUpstream
from bdh_batch.upstreams.cumulative import Cumulative
from bdh_batch.upstreams.gradio_values import inputs_of, said_in
from bdh_batch.upstreams.html import Cleaner, Sections
from bdh_batch.upstreams.protocol import EndpointFacts, Fault, FaultKind, Piece, TextRequest
from bdh_batch.upstreams.sse import events
from bdh_batch.upstreams.web import asked, described, is_alive, open_client, parsed, read_json

PREFIX = "/gradio_api"
EVENT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
LARGEST_EVENT_ID = 65536  # bytes of the response to a POST
BUSY_PART = 0.2  # of the time that a stream may take to read texts that come again and again
OWN_NAMES = frozenset(("message", "history", "system", "prompt"))


class GradioConnector:
    """Speaks Gradio's HTTP API."""

    takes_messages = True
    stops = False

    def __init__(self, upstream: GradioUpstream) -> None:
        self._upstream = upstream
        self._client = open_client(upstream)
        self._cleaner = None if upstream.html is None else Cleaner(upstream.id, upstream.html)

    def expresses(self, chat: bool, ours: bool) -> Collection[str]:
        return self._upstream.placeholders - OWN_NAMES

    async def stream(self, address: str, request: TextRequest) -> AsyncGenerator[Piece, None]:
        upstream = self._upstream
        url = f"{address}{PREFIX}/call/{upstream.api}"
        body = {"data": inputs_of(upstream, request)}
        async with asked(self._client, "POST", url, request.headers, body) as response:
            begun = await read_json(response, LARGEST_EVENT_ID)
            headers = {**request.headers, **_cookies(response)}
        event_id = begun.get("event_id") if isinstance(begun, dict) else None
        if not isinstance(event_id, str) or not EVENT_ID.fullmatch(event_id):
            raise Fault(FaultKind.MALFORMED, "no event id")
        reader = Reader(upstream, self._cleaner)
        async with (
            asked(self._client, "GET", f"{url}/{event_id}", headers) as response,
            aclosing(events(response, upstream.max_message_bytes)) as source,
        ):
            async for event in source:
                if (piece := await reader.read(event.event, event.data)) is not None:
                    yield piece
                    if piece.finish_reason is not None:
                        return

    async def probe(self, address: str) -> EndpointFacts:
        try:
            async with asked(self._client, "GET", f"{address}{PREFIX}/app_id", {}) as response:
                await read_json(response, LARGEST_EVENT_ID)
        except Fault as fault:
            if not is_alive(fault):
                raise
        return EndpointFacts()

    async def prompt_ids(self, address: str, request: TextRequest) -> Sequence[int] | None:
        return None  # no app is a server like this one

    async def close(self) -> None:
        await self._client.aclose()


def _cookies(response: httpx.Response) -> Mapping[str, str]:
    """Returns the header with the response's cookies, for the next request of the same client's: by them, what balances
    the load of several servers knows which one has the event."""
    pairs = [f"{cookie.name}={cookie.value}" for cookie in response.cookies.jar if cookie.value is not None]
    plain = [pair for pair in pairs if pair.isascii() and pair.isprintable()]
    return {"cookie": "; ".join(plain)} if plain else {}


class Reader:
    """Makes pieces of the events of one request."""

    def __init__(self, upstream: GradioUpstream, cleaner: Cleaner | None) -> None:
        self._upstream = upstream
        self._cleaner = cleaner
        self._text, self._thoughts = Cumulative(), Cumulative()
        self._not_before = 0.0

    async def read(self, event: str, data: str) -> Piece | None:
        """Returns what an event adds, if it does. Raises Fault."""
        if event == "error":
            raise Fault(FaultKind.ERROR, described(parsed(data))[0] if data else "")
        if event == "complete":
            piece = await off_the_loop(len(data), self._piece, data, True)
            piece.finish_reason = FinishReason.STOP
            return piece
        began = time.monotonic()
        if event != "generating" or began < self._not_before:
            return None
        piece = await off_the_loop(len(data), self._piece, data, False)
        # Each text has all that came before it: to read every one would take the square of the response's length.
        ended = time.monotonic()
        self._not_before = ended + (ended - began) * (1 / BUSY_PART - 1)
        return piece if piece.text or piece.extras else None

    def _piece(self, data: str, final: bool) -> Piece:
        said, titled = said_in(parsed(data), self._upstream.output)
        found = Sections(said, "") if self._cleaner is None else self._cleaner.clean(said, final)
        text = self._text.advance(found.text)
        if not self._upstream.reasoning:
            return Piece(text)
        thoughts = self._thoughts.advance("\n".join(filter(None, (titled.strip(), found.thoughts))))
        return Piece(text, extras={"delta": {"reasoning_content": thoughts}} if thoughts else None)
