"""The endpoints: each parses, asks the gate for the model, and answers."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bdh_batch import __version__
from bdh_batch.errors import InvalidRequest, ModelNotFound, Unavailable
from bdh_batch.http.errors import error_response
from bdh_batch.http.frames import Answer, ChatFrames, CompletionFrames, Frames
from bdh_batch.http.gate import Gate, ServedModel
from bdh_batch.http.generation import EventStream, whole
from bdh_batch.http.quota import Quota
from bdh_batch.http.wire import ChatBody, CompletionBody, GenerationBody, parse
from bdh_batch.messages import GenerationRequest
from bdh_batch.settings import Api
from bdh_batch.telemetry import Metrics

TIMEOUT_HEADER = "x-request-timeout"
LONGEST_TIMEOUT = 86400.0  # seconds


class Routes:
    def __init__(self, gate: Gate, metrics: Metrics, api: Api, quota: Quota) -> None:
        self._gate = gate
        self._metrics = metrics
        self._api = api
        self._quota = quota

    def table(self) -> list[Route]:
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            *(Route(path, self.health) for path in ("/health", "/healthz", "/livez")),
            *(Route(path, self.ready) for path in ("/readyz", "/ready")),
            Route("/metrics", self.metrics),
            Route("/", self.root),
        ]

    async def completions(self, request: Request) -> Response:
        body = parse(await request.body(), CompletionBody, self._api.unknown_fields)
        model = self._model(request, body.model)
        answer = _answer(f"cmpl-{request.state.id}", body, model)
        requests = body.requests(request.state.id, model.defaults)
        return await self._respond(request, model, requests, CompletionFrames(answer), bool(body.stream))

    async def chat_completions(self, request: Request) -> Response:
        body = parse(await request.body(), ChatBody, self._api.unknown_fields)
        model = self._model(request, body.model)
        answer = _answer(f"chatcmpl-{request.state.id}", body, model)
        requests = body.requests(request.state.id, model.defaults, model.template)
        return await self._respond(request, model, requests, ChatFrames(answer), bool(body.stream))

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

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

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

    async def _respond(
        self,
        request: Request,
        model: ServedModel,
        requests: list[GenerationRequest],
        frames: Frames,
        stream: bool,
    ) -> Response:
        timeout = _timeout(request)
        timed = [replace(each, timeout=timeout) for each in requests]
        generation = await self._quota.start(request, model.backend, timed)
        if stream:
            return EventStream(generation, frames)
        return await whole(generation, frames, request)


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
        token_ids=bool(body.return_token_ids),
        include_usage=body.include_usage,
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
