"""The handlers of the Messages API (`http/endpoints.py`): each request is served as one to /v1/chat/completions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh_batch.backends.base import TextBackend
from bdh_batch.http.anthropic.bodies import CountTokensBody, MessagesBody
from bdh_batch.http.anthropic.frames import MessageFrames
from bdh_batch.http.anthropic.translation import chat_fields
from bdh_batch.http.request.client import Client
from bdh_batch.http.schema.other_names import Names
from bdh_batch.http.schema.requests import ChatBody
from bdh_batch.http.serving import Serving, response_options


class Messages:
    """Handles the requests of the Messages API."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def create(self, request: Request) -> Response:
        serving, client = self._serving, Client.of(request)
        raw = await request.body()
        body, names = await serving.aside(client).run(len(raw), self._read, raw, MessagesBody, client)
        model = await serving.model(client, body.model)
        options = response_options(f"msg_{client.id}", body, model)
        finds_calls = body.may_call and not isinstance(model.backend, TextBackend)  # an upstream finds them itself
        frames = MessageFrames(options, model.backend.tokenizer, names, body.tool_names if finds_calls else None)
        with names.as_written():
            prepared = await serving.preparation(client, model, len(raw)).generation(body)
            return await serving.respond(client, model, body, len(raw), prepared, frames)

    async def count_tokens(self, request: Request) -> Response:
        """Counts as a request to /v1/messages does, whose prompt it would be."""
        serving, client = self._serving, Client.of(request)
        raw = await request.body()
        body, names = await serving.aside(client).run(len(raw), self._read, raw, CountTokensBody, client)
        model = await serving.model(client, body.model)
        with names.as_written():
            prepared = await serving.preparation(client, model, len(raw)).generation(body)
        return JSONResponse({"input_tokens": prepared.prompt_tokens})

    def _read(self, raw: bytes, kind: type[CountTokensBody], client: Client) -> tuple[ChatBody, Names]:
        """The chat body that a request's body stands for. Raises InvalidRequest."""
        body = self._serving.parse_for_model(raw, kind, client.caller)
        values, names = chat_fields(body)
        # An upstream of the same API gets images as they came; no fields of the client's do.
        passed_on = None if self._serving.gate.passed_on(client.caller, body.model) is None else ()
        with names.as_written():
            return self._serving.check(values, ChatBody, passed_on), names
