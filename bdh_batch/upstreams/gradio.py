"""Upstreams that are Gradio apps, asked by Gradio's HTTP API: a POST begins an event, a stream of events follows it.

An app ends an event, or takes it out of its queue, when the stream that follows it is closed. One that nobody follows
is worked off to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Event:
    """A request as the app knows it: where it is followed, and with which headers."""

    url: str
    headers: Mapping[str, str]


class GradioConnector:
    """Speaks Gradio's HTTP API."""

    takes_messages = True
    stops = False

    def __init__(self, upstream: GradioUpstream) -> None:
        self._upstream = upstream
        self._client = open_client(upstream)
        self._cleaner = None if upstream.html is None else Cleaner(upstream.id, upstream.html)
        self._leaving: set[asyncio.Task[None]] = set()

    def expresses(self, chat: bool, ours: bool) -> Collection[str]:
        return self._upstream.placeholders - OWN_NAMES

    async def stream(self, address: str, request: TextRequest) -> AsyncGenerator[Piece, None]:
        url = f"{address}{PREFIX}/call/{self._upstream.api}"
        joined = asyncio.create_task(self._join(url, request))
        followed = False
        try:
            event = await asyncio.shield(joined)
            async with (
                asked(self._client, "GET", event.url, event.headers) as response,
                aclosing(events(response, self._upstream.max_message_bytes)) as source,
            ):
                followed = True
                reader = Reader(self._upstream, self._cleaner)
                async for item in source:
                    if (piece := await reader.read(item.event, item.data)) is not None:
                        yield piece
                        if piece.finish_reason is not None:
                            return
        except asyncio.CancelledError:
            if not followed:
                self._leave(joined)
            raise

    async def _join(self, url: str, request: TextRequest) -> Event:
        """Has the app begin. Raises Fault."""
        body = {"data": inputs_of(self._upstream, request)}
        async with asked(self._client, "POST", url, request.headers, body) as response:
            begun = await read_json(response, LARGEST_EVENT_ID)
            headers = {**request.headers, **_cookies(response)}
        event_id = begun.get("event_id") if isinstance(begun, dict) else None
        if not isinstance(event_id, str) or not EVENT_ID.fullmatch(event_id):
            raise Fault(FaultKind.MALFORMED, "no event id")
        return Event(f"{url}/{event_id}", headers)

    def _leave(self, joined: asyncio.Task[Event]) -> None:
        """Has the app end an event that nobody follows, once it has begun."""

        async def follow_and_leave() -> None:
            # Where the app fails, there is nothing to be ended, and nobody left to be told.
            with contextlib.suppress(Fault, TimeoutError):
                async with asyncio.timeout(2 * self._upstream.connect_seconds):
                    event = await joined
                    async with asked(self._client, "GET", event.url, event.headers):
                        pass

        leaving = asyncio.create_task(follow_and_leave())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

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
        for leaving in [*self._leaving]:
            leaving.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
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
