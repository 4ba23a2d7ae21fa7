"""Looks at every response of /v1/responses and /v1/messages that comes to this process by httpx or httpx2, which the
official clients use, too: the events of a stream are of their types and come in their order, and responses are as Open
Responses has them. Tests need not ask for it, and what is wrong fails the one that was running."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import httpx
import httpx2
import pytest

RESPONSES, MESSAGES, AFTER = "/v1/responses", "/v1/messages", "starting_after"
EVENTS, JSON = "text/event-stream", "application/json"


class Events(Protocol):
    """The states of one stream; `done` is what follows its last event."""

    @property
    def done(self) -> str | None: ...

    def take(self, event: dict[str, Any]) -> None: ...

    def end(self) -> None: ...


class Body:
    """The body of a response, piece by piece. The first thing that is wrong goes to a list, and its reader reads on."""

    def __init__(self, name: str, wrong: list[str]) -> None:
        self._name = name
        self._wrong = wrong
        self._is_wrong = False
        self._left = bytearray()

    def take(self, piece: bytes, last: bool = False) -> None:
        if self._is_wrong:
            return
        self._left += piece
        try:
            self._look(last)
        except (AssertionError, KeyError, ValueError) as error:  # also pydantic's and json's
            self._is_wrong = True
            self._wrong.append(f"{self._name}: {error!r}")

    def _look(self, last: bool) -> None:
        raise NotImplementedError


class Whole(Body):
    """What is no stream: a response, or something else."""

    def _look(self, last: bool) -> None:
        if last and (found := json.loads(self._left)).get("object") == "response" and "deleted" not in found:
            from tests.http.open_responses import check_response

            check_response(found)


class Stream(Body):
    """One that its reader leaves, or whose server is gone, may end anywhere."""

    def __init__(self, name: str, wrong: list[str], events: Events) -> None:
        super().__init__(name, wrong)
        self._events = events
        self._is_over = False

    def _look(self, last: bool) -> None:
        while (end := self._left.find(b"\n\n")) >= 0:
            self._frame(self._left[:end].decode().split("\n"))
            del self._left[: end + 2]
        if last:
            assert not self._left
            self._events.end()
            assert self._is_over or self._events.done is None, f"{self._events.done} is missing"

    def _frame(self, lines: list[str]) -> None:
        fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
        if not fields:
            return
        assert not self._is_over
        if (data := fields.pop("data")) == self._events.done:
            self._events.end()
            self._is_over = True
        else:
            event = json.loads(data)
            assert fields == {"event": event["type"]}
            self._events.take(event)


def body_of(request: Any, response: Any, wrong: list[str]) -> Body | None:
    """None where there is nothing to look at. They are those of httpx or of httpx2."""
    path, kind, name = request.url.path, response.headers.get("content-type", ""), f"{request.method} {request.url}"
    if response.status_code != httpx.codes.OK or (RESPONSES not in path and not path.endswith(MESSAGES)):
        return None
    if MESSAGES in path:
        from tests.http.message_events import MessageEvents

        return Stream(name, wrong, MessageEvents()) if kind.startswith(EVENTS) else None
    if kind.startswith(EVENTS):
        from tests.http.response_events import ResponseEvents

        first = int(request.url.params.get(AFTER, -1)) + 1
        return Stream(name, wrong, ResponseEvents(first, may_stop=request.method == "GET"))
    return Whole(name, wrong) if kind.startswith(JSON) else None


class Pieces(httpx.SyncByteStream, httpx2.SyncByteStream):
    """What a transport of either library reads."""

    def __init__(self, pieces: Any, body: Body) -> None:
        self._pieces = pieces
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._body.take(piece)
            yield piece
        self._body.take(b"", last=True)

    def close(self) -> None:
        self._pieces.close()


class AsyncPieces(httpx.AsyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, pieces: Any, body: Body) -> None:
        self._pieces = pieces
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            self._body.take(piece)
            yield piece
        self._body.take(b"", last=True)

    async def aclose(self) -> None:
        await self._pieces.aclose()


def look_at_all(patch: pytest.MonkeyPatch, wrong: list[str]) -> None:
    """From now on, what is wrong with responses that this process reads goes to `wrong`."""
    for library in (httpx, httpx2):
        patch.setattr(library.HTTPTransport, "handle_request", _looking(library.HTTPTransport.handle_request, wrong))
        transport = library.AsyncHTTPTransport
        patch.setattr(transport, "handle_async_request", _async_looking(transport.handle_async_request, wrong))


def _looking(handle: Any, wrong: list[str]) -> Any:
    def handle_request(self: Any, request: Any) -> Any:
        response = handle(self, request)
        if (body := body_of(request, response, wrong)) is not None:
            response.stream = Pieces(response.stream, body)
        return response

    return handle_request


def _async_looking(handle: Any, wrong: list[str]) -> Any:
    async def handle_async_request(self: Any, request: Any) -> Any:
        response = await handle(self, request)
        if (body := body_of(request, response, wrong)) is not None:
            response.stream = AsyncPieces(response.stream, body)
        return response

    return handle_async_request
