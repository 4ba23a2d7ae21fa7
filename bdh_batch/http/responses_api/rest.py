"""The handlers of the Responses API (`http/endpoints.py`): each request is served as one to /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from bdh_batch.backends.base import TextBackend
from bdh_batch.errors import InvalidRequest, StoreFailed, UnknownParameter
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.client import Client
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses.generation import EventStream, whole
from bdh_batch.http.responses.json_pieces import JsonInPieces
from bdh_batch.http.responses_api.background import Background, EventLog, Run, stream_of
from bdh_batch.http.responses_api.bodies import INCLUDED, LOGPROBS, InputTokensBody, ResponseBody, ToolSelection
from bdh_batch.http.responses_api.frames import ResponseFrames
from bdh_batch.http.responses_api.stored.records import KIND, Conversations, Item, Stored, weight
from bdh_batch.http.responses_api.stored.saving import Saving
from bdh_batch.http.responses_api.stored.transcript import Transcript
from bdh_batch.http.responses_api.translation import TurnBody, chat_fields, input_items, messages_of
from bdh_batch.http.schema.other_names import Names
from bdh_batch.http.serving import Serving, response_options
from bdh_batch.messages import GenerationRequest
from bdh_batch.store.records import NewState

MOST_LISTED, LISTED = 100, 20
UNFINISHED = ("queued", "in_progress")
STOP_SECONDS, LOOK_SECONDS = 5.0, 0.1  # in which another process ends a response, and between two looks whether it has


@dataclass(frozen=True, slots=True)
class Turn:
    """What a body asks for.

    Args:
        before: what it goes on from.
        items: those of its input.
        body: the chat body that it stands for, and `names` of its fields.
        size: bytes, those of what is stored of the conversation included.
    """

    before: Stored | None
    items: Sequence[Item]
    body: TurnBody
    names: Names
    size: int


class Responses:
    """Handles the requests of the Responses API."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._limits = serving.settings.limits
        self._store = serving.records
        self._conversations = Conversations(serving.records, self._limits.max_body_bytes)
        self._background = Background(self._limits.max_background, serving.records)
        serving.on_close(self._background.close)
        serving.on_close(self._conversations.close)

    async def create(self, request: Request) -> Response:
        serving, client, raw = self._serving, Client.of(request), await request.body()
        aside, owner = serving.aside(client), client.caller.owner
        body = await aside.run(len(raw), serving.parse, raw, ResponseBody)
        if body.background:
            self._background.reserve(owner, client.cleanup)
        unique = secrets.token_hex(16)
        turn = await self._turn(body, unique, owner, aside, len(raw))
        model = await serving.model(client, body.model)
        options = response_options(f"resp_{unique}", turn.body, model)
        transcript = Transcript.of(aside, model, turn.before)
        with turn.names.as_written():
            prepared = await serving.preparation(client, model, turn.size).generation(turn.body, transcript)
            prepared, new = await self._with_states(client, model, body, prepared, transcript)
            # What goes on from drawn tokens is not determined by its fields alone.
            kept = None if turn.before is not None else turn.body
            generation = await serving.start(client, model, prepared, kept, len(raw))
        saving = None if new is None else Saving(generation, new, self._store)
        generation = saving or generation
        if body.background:
            aside = serving.off_loop.of(client.caller.label)  # its client may leave
        known = [*([] if turn.before is None else turn.before.items), *turn.items]

        async def put(frames: ResponseFrames, ended: bool, new: bool) -> bool:
            if body.store is False:
                return False
            response = frames.response | {"store": True}
            size = turn.size + frames.size
            if ended:
                text, tokens = frames.text.getvalue(), frames.tokens
                value = await aside.run(size, transcript.stored, response, known, text, tokens, model.backend)
            else:
                process = self._store.process if response["status"] in UNFINISHED else None
                value = Stored(response, known, process=process)
            done = await self._conversations.put(value, owner, aside, size, new)
            if ended and saving is not None:
                if done:
                    self._conversations.adopt(saving, value, owner, serving.off_loop.of(client.caller.label))
                else:
                    saving.drop()
            return done

        finds_calls = turn.body.may_call and not isinstance(model.backend, TextBackend)  # an upstream finds them itself
        frames = ResponseFrames(
            options,
            model.backend.tokenizer,
            _new(body, f"resp_{unique}", model),
            turn.names,
            turn.body.tool_names if finds_calls else None,
            aside,
            len(raw),
            partial(put, ended=True, new=not body.background),
        )
        if prepared.grammar is not None:
            frames.warn(prepared.grammar.warnings)
        keepalive = serving.settings.server.sse_keepalive_seconds
        chunk_tokens = turn.body.options.chunk_tokens or 1
        if body.background:
            log = EventLog(self._limits.max_background_bytes)
            log.add(frames.queued(), frames.number)
            try:
                if not await put(frames, ended=False, new=True):
                    raise StoreFailed("The response could not be stored, as one in the background has to be.")
            except BaseException:
                generation.abort()
                raise
            under_way = partial(put, ended=False, new=False)
            run = Run(owner, generation, frames, under_way, log, chunk_tokens, client.cleanup.pop_all())
            self._background.start(run)
            return stream_of(run, keepalive) if body.stream else _json(frames.response)
        if body.stream:
            return EventStream(generation, frames, aside, chunk_tokens, keepalive)
        with turn.names.as_written():
            return await whole(generation, frames, client, aside)

    async def count(self, request: Request) -> Response:
        """Counts as a request to /v1/responses does, whose prompt it would be."""
        serving, client, raw = self._serving, Client.of(request), await request.body()
        aside = serving.aside(client)
        body = await aside.run(len(raw), serving.parse, raw, InputTokensBody)
        turn = await self._turn(body, "0", client.caller.owner, aside, len(raw))
        model = await serving.model(client, body.model)
        with turn.names.as_written():
            transcript = Transcript.of(aside, model, turn.before)
            prepared = await serving.preparation(client, model, turn.size).generation(turn.body, transcript)
        return _json({"object": "response.input_tokens", "input_tokens": prepared.prompt_tokens})

    async def retrieve(self, request: Request) -> Response:
        self._check_query(request, "include", "include_obfuscation", "starting_after", "stream")
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
            if run is None:
                text = "Only the process that has a response in the background has its events, for some time after its"
                raise InvalidRequest(f"stream: {text} end: retrieve the response without them.", "stream")
            return stream_of(run, self._serving.settings.server.sse_keepalive_seconds, after)
        return await self._shown(run, found, aside)

    async def delete(self, request: Request) -> Response:
        self._check_query(request)
        run, found, _ = await self._found(request)
        await self._stop(run, found, request)
        id = found.response["id"]
        self._background.forget(id)
        await self._store.delete(KIND, id, request.state.caller.owner)
        return _json({"id": id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        self._check_query(request)
        run, found, _ = await self._found(request)
        if not found.response["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.")
        await self._stop(run, found, request)
        return await self._shown(*await self._found(request))

    async def input_items(self, request: Request) -> Response:
        self._check_query(request, "after", "include", "limit", "order")
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
        return await aside.run(found.size, _json, shown)

    async def _turn(self, body: InputTokensBody, unique: str, owner: str, aside: Aside, size: int) -> Turn:
        """
        Raises:
            InvalidRequest, NotFound
        """
        before, id = None, body.previous_response_id
        if id is not None:
            before = await self._conversations.find(id, owner, aside, "previous_response_id")
            if (status := before.response["status"]) not in ("completed", "incomplete"):
                text = f"The previous response is {status}: only one that has ended well can be gone on from."
                raise InvalidRequest(text, "previous_response_id")
        listed = await aside.run(size, input_items, body, unique)
        items, referred = await self._conversations.resolved(listed, owner, aside)
        size += referred + (0 if before is None else before.size)
        turn, names = await aside.run(size, self._chat, body, items, before)
        return Turn(before, items, turn, names, size)

    def _chat(self, body: InputTokensBody, items: Sequence[Item], before: Stored | None) -> tuple[TurnBody, Names]:
        values, names = chat_fields(body, items)
        if not values["messages"] or not (items or before):
            raise InvalidRequest("input: Input should have at least 1 item.", "input")
        with names.as_written():
            turn = self._serving.check(values, TurnBody)
        if before is not None:
            known = before.items
            self._conversations.check(weight(known), "previous_response_id")
            if len(known) + len(items) > (most := self._limits.max_messages):
                text = f"With the turns before it, the conversation has more than {most} items (limits.max_messages)."
                raise InvalidRequest(text, "previous_response_id")
            if body.instructions is not None:
                turn.instructed()
            turn.goes_on_from([message for _, message in messages_of(known)])
        return turn, names

    async def _with_states(
        self,
        client: Client,
        model: ServedModel,
        body: ResponseBody,
        prepared: GenerationRequest,
        transcript: Transcript,
    ) -> tuple[GenerationRequest, NewState | None]:
        """The request, which begins in the state of the response before, if there is one, and where its own is written
        if it is to be stored."""
        if isinstance(model.backend, TextBackend):
            return prepared, None
        if transcript.before is not None and transcript.salt:
            prepared = replace(prepared, salt=transcript.salt + prepared.salt)
        if transcript.goes_on and transcript.before is not None:
            found = await self._conversations.state(transcript.before, client.caller.owner)
            if found is not None:
                state, close = found
                client.cleanup.callback(close)
                prepared = replace(prepared, state=state, state_optional=True)
        if body.store is False or not self._serving.settings.store.response_states:
            return prepared, None
        new = self._store.new_state()
        return replace(prepared, save_to=str(new.path)), new

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
        return await aside.run(found.size, _json, response)

    def _check_query(self, request: Request, *known: str) -> None:
        """Raises UnknownParameter."""
        if self._serving.settings.api.unknown_fields == "refuse":
            for name in request.query_params:
                if name.removesuffix("[]") not in known:
                    raise UnknownParameter(f"Unknown parameter: {name[:128]!r}.", name[:128])


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


def _json(value: Any) -> Response:
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
