"""The handlers of the Responses API (`http/endpoints.py`): each request is served as one to /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bdh_batch.backends.base import Backend, Generation, SharedBackend, TextBackend
from bdh_batch.errors import InvalidRequest, StoreFailed
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.client import Client
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses.generation import EventStream, whole
from bdh_batch.http.responses_api.background import Background, EventLog, Run, stream_of
from bdh_batch.http.responses_api.bodies import InputTokensBody, ResponseBody, ToolSelection
from bdh_batch.http.responses_api.frames import ResponseFrames
from bdh_batch.http.responses_api.stored.keeping import Keeping
from bdh_batch.http.responses_api.stored.opening import Opening
from bdh_batch.http.responses_api.stored.records import Conversations, Item, Stored, weight
from bdh_batch.http.responses_api.stored.rest import StoredResponses, json_response
from bdh_batch.http.responses_api.stored.saving import Saving
from bdh_batch.http.responses_api.stored.transcript import Transcript
from bdh_batch.http.responses_api.translation import TurnBody, chat_fields, input_items, messages_of
from bdh_batch.http.schema.other_names import Names
from bdh_batch.http.serving import Serving, response_options
from bdh_batch.messages import GenerationRequest
from bdh_batch.store.records import NewState


@dataclass(frozen=True, slots=True)
class Turn:
    """What a body asks for.

    Args:
        before: what it goes on from.
        known: the items of that, and those of its input.
        body: the chat body that it stands for, and `names` of its fields.
        size: bytes, those of what is stored of the conversation included.
    """

    before: Stored | None
    known: Sequence[Item]
    body: TurnBody
    names: Names
    size: int


class Responses:
    """Handles the requests of the Responses API that make a response; `stored` handles the others."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._limits = serving.settings.limits
        self._store = serving.records
        self._conversations = Conversations(serving.records, self._limits.max_body_bytes)
        self._background = Background(self._limits.max_background, serving.records)
        serving.events.offer(self._background.log)
        self.stored = StoredResponses(serving, self._conversations, self._background)
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
        response = await aside.run(len(raw), _new, body, options.id, model)
        transcript = Transcript.of(aside, model, turn.before)
        with turn.names.as_written():
            async with self._opening(client, model, transcript) as opening:
                prepared = await serving.preparation(client, model, turn.size).generation(turn.body, transcript)
                transcript.latent = prepared.latent
                prepared, new = await self._with_states(model, body, prepared, transcript, opening)
            # What goes on from drawn tokens is not determined by its fields alone.
            kept = None if turn.before is not None else turn.body
            generation = await serving.start(client, model, prepared, kept, len(raw))
        saving = None if new is None else Saving(generation, new, self._store)
        generation = generation if saving is None else saving
        if body.background:
            aside = aside.of_nobody()
        keeping = Keeping(
            self._conversations,
            transcript,
            model.backend,
            owner,
            turn.known,
            turn.size,
            saving,
            aside,
            bool(body.background),
        )
        finds_calls = turn.body.may_call and not isinstance(model.backend, TextBackend)  # an upstream finds them itself
        frames = ResponseFrames(
            options,
            model.backend.tokenizer,
            response,
            turn.names,
            turn.body.tool_names if finds_calls else None,
            aside,
            len(raw),
            None if body.store is False else keeping.end,
        )
        if prepared.grammar is not None:
            frames.warn(prepared.grammar.warnings)
        keepalive = serving.settings.server.sse_keepalive_seconds
        chunk_tokens = turn.body.options.chunk_tokens or 1
        if body.background:
            run = await self._begun(generation, frames, keeping, chunk_tokens, client)
            if body.stream:
                return stream_of(run.log, keepalive)
            return await aside.run(len(raw), json_response, frames.response)
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
        return json_response({"object": "response.input_tokens", "input_tokens": prepared.prompt_tokens})

    async def _begun(
        self, generation: Generation, frames: ResponseFrames, keeping: Keeping, chunk_tokens: int, client: Client
    ) -> Run:
        """Starts one in the background, which has to be stored for that. Raises StoreFailed."""
        log = EventLog(self._limits.max_background_bytes)
        try:
            log.add(await keeping.aside.run(keeping.size, frames.queued), frames.number)
            if not await keeping.begin(frames):
                raise StoreFailed("The response could not be stored, as one in the background has to be.")
        except BaseException:
            generation.abort()
            raise
        run = Run(keeping.owner, generation, frames, keeping.go_on, log, chunk_tokens, client.cleanup.pop_all())
        self._background.start(run)
        return run

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
        turn, names, known = await aside.run(size, self._chat, body, items, before)
        return Turn(before, known, turn, names, size)

    def _chat(
        self, body: InputTokensBody, items: Sequence[Item], before: Stored | None
    ) -> tuple[TurnBody, Names, Sequence[Item]]:
        values, names = chat_fields(body, items)
        if not values["messages"] or not (items or before):
            raise InvalidRequest("input: Input should have at least 1 item.", "input")
        with names.as_written():
            turn = self._serving.check(values, TurnBody)
        known = [] if before is None else before.items
        if before is not None:
            self._conversations.check(weight(known), "previous_response_id")
            if len(known) + len(items) > (most := self._limits.max_messages):
                text = f"With the turns before it, the conversation has more than {most} items (limits.max_messages)."
                raise InvalidRequest(text, "previous_response_id")
            if body.instructions is not None:
                turn.instructed()
            turn.goes_on_from([message for _, message in messages_of(known)])
        return turn, names, [*known, *items]

    def _opening(self, client: Client, model: ServedModel, transcript: Transcript) -> Opening:
        """Begins to open the file of the state that a turn may begin in."""
        before = transcript.before
        if before is None or isinstance(model.backend, TextBackend):
            return Opening(None, client.cleanup)
        own = _is_own(model.backend, before, self._store.process)
        waits = not (own and self._serving.settings.prefix_cache.enabled)
        state = self._conversations.state(before, client.caller.owner, transcript.aside, waits)
        return Opening(state, client.cleanup)

    async def _with_states(
        self,
        model: ServedModel,
        body: ResponseBody,
        prepared: GenerationRequest,
        transcript: Transcript,
        opening: Opening,
    ) -> tuple[GenerationRequest, NewState | None]:
        """The request, which begins in the state of the response before, if there is one, and where its own is written
        if it is to be stored."""
        if isinstance(model.backend, TextBackend):
            return prepared, None
        if transcript.before is not None and transcript.salt:
            prepared = replace(prepared, salt=transcript.salt + prepared.salt)
        transcript.prefix_salt = prepared.salt
        if transcript.goes_on and (state := await opening.take()) is not None:
            prepared = replace(prepared, state=state, state_optional=True)
        if body.store is False or not self._serving.settings.store.response_states:
            return prepared, None
        new = self._store.new_state()
        return replace(prepared, save_to=str(new.path)), new


def _is_own(backend: Backend, before: Stored, process: str) -> bool:
    """Whether the engine that computes a turn has computed the one before it, and may have its prefix."""
    return backend.engines == 1 if isinstance(backend, SharedBackend) else before.saver in ("", process)


def _new(body: ResponseBody, id: str, model: ServedModel) -> dict[str, Any]:
    """A response that has just begun, with all fields that the specification requires."""
    defaults, choice = model.defaults, body.tool_choice
    if isinstance(choice, ToolSelection):
        choice = choice.model_dump(exclude_none=True)
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
        "parallel_tool_calls": body.parallel_tool_calls is not False and body.max_tool_calls != 1,
        "presence_penalty": body.presence_penalty or 0.0,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "text": {"format": _format(body)},
        "tool_choice": choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _format(body: ResponseBody) -> dict[str, Any]:
    """`text.format` as responses have it: that of a schema with all of its fields."""
    form = None if body.text is None else body.text.format
    if form is None:
        return {"type": "text"}
    if form.type != "json_schema":
        return {"type": form.type}
    return {**form.model_dump(by_alias=True), "strict": bool(form.strict)}
