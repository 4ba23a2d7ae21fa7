"""The handlers of the Responses API (`http/endpoints.py`): each request is served as one to /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh_batch.backends.base import TextBackend
from bdh_batch.errors import InvalidRequest
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.client import Client
from bdh_batch.http.responses.generation import EventStream, whole
from bdh_batch.http.responses_api.background import Background, Run, stream_of
from bdh_batch.http.responses_api.bodies import InputTokensBody, ResponseBody, ToolSelection
from bdh_batch.http.responses_api.frames import ResponseFrames
from bdh_batch.http.responses_api.records import KIND, Stored, Transcript, is_put, resolved, stored
from bdh_batch.http.responses_api.translation import TurnBody, chat_fields, input_items, messages_of
from bdh_batch.http.schema.other_names import Names
from bdh_batch.http.serving import Serving, response_options

MOST_LISTED, LISTED = 100, 20
UNFINISHED = ("queued", "in_progress")
Items = Sequence[Mapping[str, Any]]


class Responses:
    """Handles the requests of the Responses API."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._records = serving.records
        self._background = Background(serving.settings.limits.max_background)
        serving.on_close(self._background.close)

    async def create(self, request: Request) -> Response:
        serving, client, raw = self._serving, Client.of(request), await request.body()
        aside, owner = serving.aside(client), client.caller.owner
        body = await aside.run(len(raw), serving.parse, raw, ResponseBody)
        if body.background:
            self._background.check(owner)
        unique = secrets.token_hex(16)
        before, items, turn, names = await self._turn(body, unique, owner, client, len(raw))
        model = await serving.model(client, body.model)
        options = response_options(f"resp_{unique}", turn, model)
        transcript = Transcript(before)
        with names.as_written():
            prepared = await serving.preparation(client, model, len(raw)).generation(turn, transcript)
            # What goes on from drawn tokens is not determined by its fields alone.
            kept = None if before is not None else turn
            generation = await serving.start(client, model, prepared, kept, len(raw))
        finds_calls = turn.may_call and not isinstance(model.backend, TextBackend)  # an upstream finds them itself
        tools = turn.tool_names if finds_calls else None
        known = [*([] if before is None else before.items), *items]

        async def put(frames: ResponseFrames, ended: bool) -> bool:
            if body.store is False:
                return False
            response = orjson.loads(orjson.dumps(frames.response | {"store": True}))
            if ended:
                text, tokens = frames.text.getvalue(), frames.tokens
                value = transcript.stored(response, known, text, tokens, model.backend)
            else:
                value = Stored(response, known)
            return await is_put(self._records, value, owner)

        response = _new(body, f"resp_{unique}", model)
        frames = ResponseFrames(options, model.backend.tokenizer, response, names, tools, partial(put, ended=True))
        if prepared.grammar is not None:
            frames.warn(prepared.grammar.warnings)
        if body.background:
            run = Run(owner, generation, frames, partial(put, ended=False), client.cleanup.pop_all())
            await put(frames, False)
            self._background.start(run)
            return stream_of(run) if body.stream else JSONResponse(frames.response)
        if body.stream:
            keepalive = serving.settings.server.sse_keepalive_seconds
            return EventStream(generation, frames, aside, turn.options.chunk_tokens or 1, keepalive)
        with names.as_written():
            return await whole(generation, frames, client, aside)

    async def count(self, request: Request) -> Response:
        """Counts as a request to /v1/responses does, whose prompt it would be."""
        serving, client, raw = self._serving, Client.of(request), await request.body()
        body = await serving.aside(client).run(len(raw), serving.parse, raw, InputTokensBody)
        before, _, turn, names = await self._turn(body, "0", client.caller.owner, client, len(raw))
        model = await serving.model(client, body.model)
        with names.as_written():
            prepared = await serving.preparation(client, model, len(raw)).generation(turn, Transcript(before))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": prepared.prompt_tokens})

    async def retrieve(self, request: Request) -> Response:
        id, owner = request.path_params["id"], request.state.caller.owner
        after = _number(request, "starting_after", -1, 0, 2**53)
        wants_stream = request.query_params.get("stream", "false")
        if wants_stream not in ("true", "false"):
            raise InvalidRequest("stream should be true or false.", "stream")
        found = await stored(self._records, id, owner)
        if wants_stream == "true":
            if (run := self._background.find(id, owner)) is None:
                text = "Only the events of a response in the background can be read again, for some time after its end."
                raise InvalidRequest(text, "stream")
            return stream_of(run, after)
        if after >= 0:
            raise InvalidRequest("starting_after can only be used with stream=true.", "starting_after")
        return JSONResponse(await self._current(found, owner))

    async def delete(self, request: Request) -> Response:
        id, owner = request.path_params["id"], request.state.caller.owner
        await stored(self._records, id, owner)
        if (run := self._background.find(id, owner)) is not None:
            run.cancel()
            await run.wait()
            self._background.forget(id)
        await self._records.delete(KIND, id, owner)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        id, owner = request.path_params["id"], request.state.caller.owner
        found = await stored(self._records, id, owner)
        if not found.response["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.")
        if (run := self._background.find(id, owner)) is not None and not run.ended:
            run.cancel()
            await run.wait()
        return JSONResponse(await self._current(await stored(self._records, id, owner), owner))

    async def input_items(self, request: Request) -> Response:
        found = await stored(self._records, request.path_params["id"], request.state.caller.owner)
        limit = _number(request, "limit", LISTED, 1, MOST_LISTED)
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest("order should be asc or desc.", "order")
        items = list(found.input) if order == "asc" else list(reversed(found.input))
        if (after := request.query_params.get("after")) is not None:
            at = next((at for at, item in enumerate(items) if item["id"] == after), None)
            if at is None:
                raise InvalidRequest("after: The response has no such item.", "after")
            items = items[at + 1 :]
        page = items[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(items) > limit})

    async def _turn(
        self, body: InputTokensBody, unique: str, owner: str, client: Client, size: int
    ) -> tuple[Stored | None, Items, TurnBody, Names]:
        """What a body goes on from, the items of its input, and the chat body that it stands for.

        Raises:
            InvalidRequest, NotFound
        """
        before, id = None, body.previous_response_id
        if id is not None:
            before = await stored(self._records, id, owner, "previous_response_id")
            if (status := before.response["status"]) not in ("completed", "incomplete"):
                text = f"The previous response is {status}: only one that has ended well can be gone on from."
                raise InvalidRequest(text, "previous_response_id")
        items = await resolved(self._records, input_items(body, unique), owner)
        turn, names = await self._serving.aside(client).run(size, self._chat, body, items, before)
        return before, items, turn, names

    def _chat(self, body: InputTokensBody, items: Items, before: Stored | None) -> tuple[TurnBody, Names]:
        values, names = chat_fields(body, items)
        if not items and before is None:
            raise InvalidRequest("input: Input should have at least 1 item.", "input")
        if not values["messages"]:
            raise InvalidRequest("input: Input should have at least 1 item.", "input")
        with names.as_written():
            turn = self._serving.check(values, TurnBody)
        if before is not None:
            if body.instructions is not None:
                turn.instructed()
            turn.goes_on_from([message for _, message in messages_of(before.items)])
        return turn, names

    async def _current(self, found: Stored, owner: str) -> dict[str, Any]:
        """The response as it is. One that was under way in a process that has ended has failed."""
        response = found.response
        if response["status"] in UNFINISHED and self._background.find(response["id"], owner) is None:
            error = {"code": "server_error", "message": "The server ended before the response did."}
            response |= {"status": "failed", "error": error}
        return response


def _new(body: ResponseBody, id: str, model: ServedModel) -> dict[str, Any]:
    """A response that has just begun, with all fields that the specification requires."""
    defaults, choice = model.defaults, body.tool_choice
    if isinstance(choice, ToolSelection):
        choice = choice.model_dump(exclude_none=True)
    form = None if body.text is None or body.text.format is None else body.text.format
    shown = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    tools = [tool.model_dump() for tool in body.tools or ()]
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model or model.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False and body.max_tool_calls is None,
        "presence_penalty": body.presence_penalty or 0.0,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": shown},
        "tool_choice": choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) < 17 and least <= int(given) <= most):
        raise InvalidRequest(f"{name} should be an integer from {least} to {most}.", name)
    return int(given)
