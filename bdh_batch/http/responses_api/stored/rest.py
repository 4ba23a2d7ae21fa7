"""The handlers of what is asked of stored responses (`http/endpoints.py`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.body import check_query
from bdh_batch.http.request.client import Client
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses.json_pieces import JsonInPieces
from bdh_batch.http.responses_api.background import Background, Run, stream_of
from bdh_batch.http.responses_api.bodies import INCLUDED, LOGPROBS
from bdh_batch.http.responses_api.stored.records import KIND, UNFINISHED, Conversations, Stored
from bdh_batch.http.serving import Serving
from bdh_batch.store.record import Record, RecordDamaged, reading

MOST_LISTED, LISTED = 100, 20
SHOWN = ("id", "object", "created_at", "model", "previous_response_id", "metadata", "incomplete_details", "usage")
STOP_SECONDS, LOOK_SECONDS = 5.0, 0.1  # in which another process ends a response, and between two looks whether it has


class StoredResponses:
    """Handles what is asked of stored responses, those that run in the background included."""

    def __init__(self, serving: Serving, conversations: Conversations, background: Background) -> None:
        self._serving = serving
        self._store = serving.records
        self._conversations = conversations
        self._background = background

    async def retrieve(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "include", "include_obfuscation", "starting_after", "stream")
        included = _included(request)
        after = _number(request, "starting_after", -1, 0, 2**53)
        streams = _flag(request, "stream")
        if _flag(request, "include_obfuscation"):
            raise InvalidRequest("include_obfuscation is not supported: it can only be false.", "include_obfuscation")
        if after >= 0 and not streams:
            raise InvalidRequest("starting_after can only be used with stream=true.", "starting_after")
        run, found, aside = await self._found(request)
        if LOGPROBS in included and not _has_logprobs(found.response):
            raise InvalidRequest("include: The response was made without log-probabilities.", "include")
        if streams:
            events = await self._serving.events.find(request.state.caller.owner, found.response["id"])
            if events is None:
                text = "Only the server that has a response in the background has its events, for some time after its"
                raise InvalidRequest(f"stream: {text} end: retrieve the response without them.", "stream")
            return stream_of(events, self._serving.settings.server.sse_keepalive_seconds, after)
        return await self._shown(run, found, aside)

    async def list(self, request: Request) -> Response:
        """One record at a time: each may have as much text as a body."""
        check_query(request, self._serving.settings, "after", "limit")
        client, limit = Client.of(request), _number(request, "limit", LISTED, 1, MOST_LISTED)
        owner, aside, after = client.caller.owner, self._serving.aside(client), request.query_params.get("after")
        if after is not None:
            await self._conversations.find(after, owner, aside, "after")
        page: list[dict[str, Any]] = []
        while found := await self._store.list(KIND, owner, 1, after):
            if len(page) == limit:
                break
            after = found[0].id
            try:
                page.append(await aside.run(len(found[0].body), _summary, found[0]))
            except RecordDamaged as error:
                self._store.left_out(after, error.message)
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return json_response({"object": "list", "data": page, **ends, "has_more": bool(found)})

    async def delete(self, request: Request) -> Response:
        check_query(request, self._serving.settings)
        run, found, _ = await self._found(request)
        await self._stop(run, found, request)
        id = found.response["id"]
        self._background.forget(id)
        await self._store.delete(KIND, id, request.state.caller.owner)
        return json_response({"id": id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        check_query(request, self._serving.settings)
        run, found, _ = await self._found(request)
        if not found.response["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.")
        await self._stop(run, found, request)
        return await self._shown(*await self._found(request))

    async def input_items(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "after", "include", "limit", "order")
        if LOGPROBS in _included(request):
            raise InvalidRequest("include: The items of an input have no log-probabilities.", "include")
        limit = _number(request, "limit", LISTED, 1, MOST_LISTED)
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest("order should be asc or desc.", "order")
        _, found, aside = await self._found(request)
        items = list(found.input) if order == "asc" else list(reversed(found.input))
        if (after := request.query_params.get("after")) is not None:
            at = next((at for at, item in enumerate(items) if item["id"] == after), None)
            if at is None:
                raise InvalidRequest("after: The response has no such item.", "after")
            items = items[at + 1 :]
        page = items[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        shown = {"object": "list", "data": page, **ends, "has_more": len(items) > limit}
        return await aside.run(found.size, json_response, shown)

    async def _found(self, request: Request) -> tuple[Run | None, Stored, Aside]:
        """The response of a request's path, and its run in this process. Raises NotFound."""
        client = Client.of(request)
        id, owner, aside = request.path_params["id"], client.caller.owner, self._serving.aside(client)
        run = self._background.find(id, owner)  # before its record is read: that of one that has ended says so
        return run, await self._conversations.find(id, owner, aside), aside

    async def _stop(self, run: Run | None, found: Stored, request: Request) -> None:
        """Ends a response in the background, if it is not over. One in another process has some time to end."""
        if run is not None:
            run.cancel()
            await run.log.wait()
        elif await self._runs_elsewhere(found):
            await self._background.stop_elsewhere(found.response["id"], request.state.caller.owner)
            until = time.monotonic() + STOP_SECONDS
            while await self._runs_elsewhere(found) and time.monotonic() < until:
                await asyncio.sleep(LOOK_SECONDS)
                _, found, _ = await self._found(request)

    async def _runs_elsewhere(self, found: Stored) -> bool:
        if found.response["status"] not in UNFINISHED or found.process in (None, self._store.process):
            return False
        assert found.process is not None
        return await self._store.lives(found.process)

    async def _shown(self, run: Run | None, found: Stored, aside: Aside) -> Response:
        """The response as it is. One that was under way in a process that has ended has failed."""
        response = found.response
        if response["status"] in UNFINISHED and not await self._runs_elsewhere(found):
            if run is None:
                error = {"code": "server_error", "message": "The server ended before the response did."}
                response |= {"status": "failed", "error": error}
            elif run.log.ended:  # its end could not be stored
                response = run.response
        return await aside.run(found.size, json_response, response)


def _summary(record: Record) -> dict[str, Any]:
    """What a list shows of a stored response: none of its text. Raises RecordDamaged."""
    with reading(record):
        response = orjson.loads(record.body)["response"]
        return {name: response[name] for name in SHOWN}


def json_response(value: Any) -> Response:
    """A value as the whole response."""
    return JsonInPieces([orjson.dumps(value)])


def _included(request: Request) -> Sequence[str]:
    """Raises InvalidRequest."""
    included = [*request.query_params.getlist("include"), *request.query_params.getlist("include[]")]
    if unknown := next((each for each in included if each not in INCLUDED), None):
        raise InvalidRequest(f"include: {unknown[:128]!r} is none of {', '.join(INCLUDED)}.", "include")
    return included


def _has_logprobs(response: dict[str, Any]) -> bool:
    """Whether all texts of a response have their log-probabilities; true where there is none."""
    parts = [part for item in response["output"] for part in item.get("content", ())]
    return all(part["logprobs"] or not part["text"] for part in parts)


def _flag(request: Request, name: str) -> bool:
    """Raises InvalidRequest."""
    given = request.query_params.get(name, "false")
    if given not in ("true", "false"):
        raise InvalidRequest(f"{name} should be true or false.", name)
    return given == "true"


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) < 17 and least <= int(given) <= most):
        raise InvalidRequest(f"{name} should be an integer from {least} to {most}.", name)
    return int(given)
