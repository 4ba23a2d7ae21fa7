"""The handler of each endpoint (`endpoints.py`): it parses, asks the gate for the model, and responds."""

from __future__ import annotations

import asyncio
from functools import partial
from operator import attrgetter

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bdh_batch import __version__
from bdh_batch.backends.base import TextBackend
from bdh_batch.errors import Unavailable
from bdh_batch.http.anthropic.rest import Messages
from bdh_batch.http.docs.openapi import openapi
from bdh_batch.http.docs.page import POLICY, page
from bdh_batch.http.endpoints import ENDPOINTS, UI
from bdh_batch.http.errors import error_response
from bdh_batch.http.gate import HostedModel, ServedModel, card
from bdh_batch.http.kserve.rest import KServe
from bdh_batch.http.neurons.rest import NeuronMaps
from bdh_batch.http.pages.rest import HEADERS, Pages, wants_page
from bdh_batch.http.prepare import Preparation
from bdh_batch.http.request.body import Body, read_object
from bdh_batch.http.request.client import Client, unless_left
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses.embeddings import embeddings
from bdh_batch.http.responses.frames import ChatFrames, CompletionFrames
from bdh_batch.http.responses.generation import CHARACTERS
from bdh_batch.http.responses.json_pieces import JsonInPieces, dump_text
from bdh_batch.http.responses.tokens import tokenization
from bdh_batch.http.responses.tool_frames import ToolFrames
from bdh_batch.http.responses_api.rest import Responses
from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.http.schema.text import (
    DetokenizeBody,
    EmbeddingBody,
    EmbeddingChat,
    ModelBody,
    TokenizeChat,
    TokenizeText,
)
from bdh_batch.http.serving import Serving, response_options
from bdh_batch.http.states.rest import States
from bdh_batch.http.watch.rest import Watch
from bdh_batch.settings import Settings
from bdh_batch.system.threads import in_daemon_thread

SHOWN_SETTINGS = {"engine", "scheduler", "prefix_cache", "generation", "limits"}  # sections that any client may know
SECRET = {"scheduler": {"weights", "trace_file"}}


class Routes:
    """Handles the requests of every endpoint."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._gate, self._metrics, self._settings = serving.gate, serving.metrics, serving.settings
        self.kserve, self.messages = KServe(serving), Messages(serving)
        self.responses, self.states = Responses(serving), States(serving)
        self.watch, self.pages, self.neurons = Watch(serving), Pages(), NeuronMaps(serving)
        self._documents: asyncio.Future[tuple[bytes, bytes]] | None = None  # the OpenAPI document, and its page

    def table(self) -> list[Route]:
        methods: dict[tuple[str, str], list[str]] = {}
        for each in ENDPOINTS:
            if each.handler.startswith("pages.") and not self._settings.server.ui:
                continue
            methods.setdefault((each.path, each.handler), []).append(each.method.upper())
        return [
            Route(
                path.replace("{id}", "{id:path}" if "/models/" in path or path.startswith(UI) else "{id}"),
                attrgetter(handler)(self),
                methods=some,
            )
            for (path, handler), some in methods.items()
        ]

    async def completions(self, request: Request) -> Response:
        raw = await request.body()
        parse, caller = self._serving.parse_for_model, request.state.caller
        body = await self._aside(request).run(len(raw), parse, raw, CompletionBody, caller)
        model = await self._model(request, body.model)
        frames = CompletionFrames(response_options(f"cmpl-{request.state.id}", body, model), model.backend.tokenizer)
        prepared = await self._preparation(request, model, raw).generation(body)
        return await self._serving.respond(Client.of(request), model, body, len(raw), prepared, frames)

    async def chat_completions(self, request: Request) -> Response:
        raw = await request.body()
        parse, caller = self._serving.parse_for_model, request.state.caller
        body = await self._aside(request).run(len(raw), parse, raw, ChatBody, caller)
        model = await self._model(request, body.model)
        options, tokenizer = response_options(f"chatcmpl-{request.state.id}", body, model), model.backend.tokenizer
        finds_calls = body.may_call and not isinstance(model.backend, TextBackend)  # an upstream finds them itself
        frames = ToolFrames(options, tokenizer, body.tool_names) if finds_calls else ChatFrames(options, tokenizer)
        prepared = await self._preparation(request, model, raw).generation(body)
        return await self._serving.respond(Client.of(request), model, body, len(raw), prepared, frames)

    async def embeddings(self, request: Request) -> Response:
        raw, aside = await request.body(), self._aside(request)
        body = await aside.run(len(raw), self._parse_embedding, raw)
        model = await self._model(request, body.model)
        prepared = await self._preparation(request, model, raw).embedding(body)
        generation = await self._serving.start(Client.of(request), model, prepared)
        return await embeddings(generation, body, body.model or model.name, Client.of(request), aside)

    async def tokenize(self, request: Request) -> Response:
        raw, aside = await request.body(), self._aside(request)
        body = await aside.run(len(raw), self._parse_tokenize, raw)
        model = await self._model(request, body.model)
        if isinstance(body, TokenizeText):
            param, text = "prompt", body.text()
        else:
            param, text = "messages", await self._preparation(request, model, raw).rendered(body)
        tokens = await model.backend.tokenize(text, param)
        tokenizer = model.backend.tokenizer if body.return_token_strs else None
        return JsonInPieces(await aside.run(len(tokens), tokenization, tokens, model.max_model_len, tokenizer))

    async def detokenize(self, request: Request) -> Response:
        raw, aside = await request.body(), self._aside(request)
        body = await aside.run(len(raw), self._parse, raw, DetokenizeBody)
        model = await self._model(request, body.model)
        text = await model.backend.detokenize(body.tokens)
        pieces = await aside.run(len(text) // CHARACTERS, dump_text, text)
        return JsonInPieces([b'{"prompt":', *pieces, b"}"])

    async def tokenizer_info(self, request: Request) -> Response:
        model = await self._model(request, request.query_params.get("model"))
        return JSONResponse(model.tokenizer_info)

    async def models(self, request: Request) -> Response:
        mine = self._gate.models(request.state.caller)
        return JSONResponse(
            {"object": "list", "data": [card(model, name) for model in mine for name in model.info.names]}
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        return JSONResponse(card(self._gate.find(request.state.caller, name), name))

    async def load_model(self, request: Request) -> Response:
        await unless_left(Client.of(request), (await self._named(request)).load_for_good())
        return JSONResponse({"success": True})

    async def unload_model(self, request: Request) -> Response:
        await unless_left(Client.of(request), (await self._named(request)).unload())
        return JSONResponse({"success": True})

    async def health(self, request: Request) -> Response:
        return _status(self._gate.health(), "ok")

    async def ready(self, request: Request) -> Response:
        return _status(self._gate.ready(), "ready")

    async def ping(self, request: Request) -> Response:
        return Response(status_code=200) if self._gate.health() is None else await self.health(request)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def load(self, request: Request) -> Response:
        return JSONResponse({"server_load": self._gate.requests()})

    async def server_info(self, request: Request) -> Response:
        config = self._settings.model_dump(mode="json", include=SHOWN_SETTINGS, exclude=SECRET)
        caller = request.state.caller
        info = {"version": __version__, "model": self._gate.find(caller, None).info.name, "config": config}
        engines = self._gate.engines(caller) if caller.is_operator else ()
        return JSONResponse(info | ({"engines": engines} if engines else {}))

    async def metrics(self, request: Request) -> Response:
        return Response(await self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        document, _ = await self._described()
        return Response(document, media_type="application/json")

    async def docs(self, request: Request) -> Response:
        _, shown = await self._described()
        return Response(shown, headers=HEADERS | {"content-security-policy": POLICY}, media_type="text/html")

    async def _described(self) -> tuple[bytes, bytes]:
        """The OpenAPI document and its page. They take a fraction of a second: the first request has them made."""
        if self._documents is None:
            self._documents = in_daemon_thread(partial(_describe, self._settings), "bdh-docs")
        return await asyncio.shield(self._documents)

    async def root(self, request: Request) -> Response:
        if self._settings.server.ui and wants_page(request):
            return await self.pages.page(request)
        return JSONResponse(
            {"name": "bdh_batch", "version": __version__, "status": self._gate.closed or "ready"},
            headers={"vary": "accept"},
        )

    def _aside(self, request: Request) -> Aside:
        return self._serving.aside(Client.of(request))

    def _parse(self, raw: bytes, kind: type[Body]) -> Body:
        return self._serving.parse(raw, kind)

    def _parse_tokenize(self, raw: bytes) -> TokenizeChat | TokenizeText:
        values = read_object(raw, self._settings.limits)
        is_text = values.get("messages") is None
        kind: type[TokenizeChat | TokenizeText] = TokenizeText if is_text else TokenizeChat
        return self._serving.check(values, kind)

    def _parse_embedding(self, raw: bytes) -> EmbeddingChat | EmbeddingBody:
        values = read_object(raw, self._settings.limits)
        is_chat = values.get("messages") is not None and values.get("input") is None
        kind: type[EmbeddingChat | EmbeddingBody] = EmbeddingChat if is_chat else EmbeddingBody
        return self._serving.check(values, kind)

    async def _model(self, request: Request, name: str | None) -> ServedModel:
        return await self._serving.model(Client.of(request), name)

    async def _named(self, request: Request) -> HostedModel:
        """The model that an operator's request names. Raises Forbidden: the caller is none."""
        body = self._parse(await request.body(), ModelBody)
        request.state.caller.check_operator()
        return self._gate.find(request.state.caller, body.model)

    def _preparation(self, request: Request, model: ServedModel, raw: bytes) -> Preparation:
        return self._serving.preparation(Client.of(request), model, len(raw))


def _describe(settings: Settings) -> tuple[bytes, bytes]:
    document = openapi(settings)
    return orjson.dumps(document), page(document, settings.server.ui)


def _status(problem: str | None, well: str) -> Response:
    if problem:
        return error_response(Unavailable(problem, retry_after=5))
    return JSONResponse({"status": well})
