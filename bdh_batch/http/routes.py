"""The endpoints: each parses, asks the gate for the model, and answers."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bdh_batch import __version__
from bdh_batch.backends.base import Generation
from bdh_batch.errors import InvalidRequest, ModelNotFound, Unavailable
from bdh_batch.http.docs import POLICY, page
from bdh_batch.http.embeddings import embeddings
from bdh_batch.http.errors import error_response
from bdh_batch.http.frames import Answer, ChatFrames, CompletionFrames, Frames
from bdh_batch.http.gate import Gate, ServedModel
from bdh_batch.http.generation import EventStream, whole
from bdh_batch.http.openapi import openapi
from bdh_batch.http.presence import unless_left
from bdh_batch.http.quota import Quota
from bdh_batch.http.tool_frames import ToolFrames
from bdh_batch.http.wire import ChatBody, CompletionBody, GenerationBody, parse, read_object
from bdh_batch.http.wire_chat import ConversationBody
from bdh_batch.http.wire_text import DetokenizeBody, EmbeddingBody, TokenizeChat, TokenizeText
from bdh_batch.messages import GenerationRequest, Text
from bdh_batch.settings import Settings
from bdh_batch.telemetry import Metrics

TIMEOUT_HEADER = "x-request-timeout"
TOLD = {"engine", "scheduler", "prefix_cache", "generation", "limits"}  # sections that any client may know
SECRET = {"scheduler": {"weights", "trace_file"}}
LONGEST_TIMEOUT = 86400.0  # seconds


class Routes:
    def __init__(self, gate: Gate, metrics: Metrics, settings: Settings, quota: Quota) -> None:
        self._gate = gate
        self._metrics = metrics
        self._settings = settings
        self._quota = quota
        document = openapi(settings)
        self._openapi, self._docs = orjson.dumps(document), page(document)

    def table(self) -> list[Route]:
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            *(Route(f"{root}/tokenize", self.tokenize, methods=["POST"]) for root in ("", "/v1")),
            *(Route(f"{root}/detokenize", self.detokenize, methods=["POST"]) for root in ("", "/v1")),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            *(Route(path, self.health) for path in ("/health", "/healthz", "/livez")),
            *(Route(path, self.ready) for path in ("/readyz", "/ready")),
            Route("/ping", self.ping, methods=["GET", "POST"]),
            Route("/version", self.version),
            Route("/load", self.load),
            Route("/server_info", self.server_info),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/docs", self.docs),
            Route("/", self.root),
        ]

    async def completions(self, request: Request) -> Response:
        body = parse(await request.body(), CompletionBody, self._settings.api.unknown_fields)
        model = self._model(request, body.model)
        answer = _answer(f"cmpl-{request.state.id}", body, model)
        requests = body.requests(request.state.id, model.defaults)
        return await self._respond(request, model, requests, body, CompletionFrames(answer, model.backend.tokenizer))

    async def chat_completions(self, request: Request) -> Response:
        body = parse(await request.body(), ChatBody, self._settings.api.unknown_fields)
        model = self._model(request, body.model)
        answer = _answer(f"chatcmpl-{request.state.id}", body, model)
        prompt = await self._rendered(request, model, body)
        requests = body.requests(request.state.id, model.defaults, prompt)
        tokenizer = model.backend.tokenizer
        frames = ToolFrames(answer, tokenizer, body.tool_names) if body.may_call else ChatFrames(answer, tokenizer)
        return await self._respond(request, model, requests, body, frames)

    async def embeddings(self, request: Request) -> Response:
        body = parse(await request.body(), EmbeddingBody, self._settings.api.unknown_fields)
        model = self._model(request, body.model)
        requests = body.requests(request.state.id, model.defaults, model.width)
        generation = await self._start(request, model, requests)
        return await embeddings(generation, body, body.model or model.name, request)

    async def tokenize(self, request: Request) -> Response:
        raw = await request.body()
        kind: type[TokenizeChat | TokenizeText] = TokenizeChat if "messages" in read_object(raw) else TokenizeText
        body = parse(raw, kind, self._settings.api.unknown_fields)
        model = self._model(request, body.model)
        if isinstance(body, TokenizeText):
            param, text = "prompt", body.text()
        else:
            param, text = "messages", await self._rendered(request, model, body)
        tokens = list(await model.backend.tokenize(text, param))
        answer: dict[str, object] = {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens}
        if body.return_token_strs:
            answer["token_strs"] = list(map(model.backend.tokenizer.name, tokens))
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        body = parse(await request.body(), DetokenizeBody, self._settings.api.unknown_fields)
        model = self._model(request, body.model)
        return JSONResponse({"prompt": await model.backend.detokenize(body.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        return JSONResponse(self._model(request, None).tokenizer_info)

    async def models(self, request: Request) -> Response:
        model = self._gate.model
        mine = [model.card()] if request.state.caller.may_use(model.names) else []
        return JSONResponse({"object": "list", "data": mine})

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        if not name:
            raise ModelNotFound(name)
        return JSONResponse(self._model(request, name).card())

    async def health(self, request: Request) -> Response:
        return _status(self._gate.health(), "ok")

    async def ready(self, request: Request) -> Response:
        return _status(self._gate.closed or self._gate.health(), "ready")

    async def ping(self, request: Request) -> Response:
        return Response(status_code=200) if self._gate.health() is None else await self.health(request)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def load(self, request: Request) -> Response:
        return JSONResponse({"server_load": self._gate.load()})

    async def server_info(self, request: Request) -> Response:
        told = self._settings.model_dump(mode="json", include=TOLD, exclude=SECRET)
        return JSONResponse({"version": __version__, "model": self._model(request, None).name, "config": told})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def docs(self, request: Request) -> Response:
        return Response(self._docs, headers={"content-security-policy": POLICY}, media_type="text/html")

    async def root(self, request: Request) -> Response:
        return JSONResponse({"name": "bdh_batch", "version": __version__, "status": self._gate.closed or "ready"})

    def _model(self, request: Request, name: str | None) -> ServedModel:
        """The model of that name; None is the one there is.

        Raises:
            ModelNotFound
            Forbidden: the caller's key is not for it.
            Unavailable
        """
        model = self._gate.model
        model.check_name(name)
        request.state.caller.check_model(name or model.name, model.names)
        return model

    async def _rendered(self, request: Request, model: ServedModel, body: ConversationBody) -> Text:
        return await unless_left(request, model.template.render(body.conversation(), request.state.caller.label))

    async def _respond(
        self,
        request: Request,
        model: ServedModel,
        requests: list[GenerationRequest],
        body: GenerationBody,
        frames: Frames,
    ) -> Response:
        if (source := body.source()) is not None:
            grammar = await unless_left(request, model.grammars.compile(source, request.state.caller.label))
            requests = [replace(each, grammar=grammar) for each in requests]
        generation = await self._start(request, model, requests)
        if body.stream:
            return EventStream(generation, frames, body.options.chunk_tokens or 1)
        return await whole(generation, frames, request)

    async def _start(self, request: Request, model: ServedModel, requests: list[GenerationRequest]) -> Generation:
        timeout = _timeout(request)
        span = request.state.span
        timed = [replace(each, timeout=timeout, span=span) for each in requests]
        generation = await self._quota.start(request, model.backend, timed)
        return generation if span is None else span.watch(generation)


def _status(problem: str | None, well: str) -> Response:
    if problem:
        return error_response(Unavailable(problem, retry_after=5))
    return JSONResponse({"status": well})


def _answer(id: str, body: GenerationBody, model: ServedModel) -> Answer:
    return Answer(
        id=id,
        created=int(time.time()),
        model=body.model or model.name,
        fingerprint=model.fingerprint,
        n=body.n or 1,
        tries=body.tries,
        token_ids=bool(body.return_token_ids),
        logprobs=body.top,
        echo=body.echoes,
        include_usage=bool(body.options.include_usage),
        continuous_usage=bool(body.options.continuous_usage_stats),
    )


def _timeout(request: Request) -> float | None:
    """The seconds that the client gives its request."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT:
        text = f"{TIMEOUT_HEADER} should be seconds, more than 0 and at most {LONGEST_TIMEOUT:.0f}."
        raise InvalidRequest(text, TIMEOUT_HEADER)
    return seconds
