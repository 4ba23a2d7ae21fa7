"""The handlers of KServe's REST endpoints (`http/endpoints.py`)."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh_batch.errors import InvalidRequest, Unavailable
from bdh_batch.http.kserve.binary import infer_response, read_inputs, split
from bdh_batch.http.kserve.bodies import GenerateBody, InferBody
from bdh_batch.http.kserve.generate import GenerateFrames
from bdh_batch.http.request.body import read_object
from bdh_batch.http.request.client import Client
from bdh_batch.http.serving import Serving, response_options
from bdh_batch.http.tensors.inference import Asked, InferRequest, ask, find_model, start, use_model, within
from bdh_batch.http.tensors.metadata import model_metadata, server_metadata

BINARY_OUTPUT = "binary_data_output"  # a parameter of a request: whether outputs are binary that do not say


class KServe:
    """Handles the requests of every endpoint of KServe."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._settings = serving.settings.kserve

    async def server(self, request: Request) -> Response:
        return JSONResponse(server_metadata())

    async def live(self, request: Request) -> Response:
        return _yes(self._serving.gate.health(), live=True)

    async def ready(self, request: Request) -> Response:
        return _yes(self._serving.gate.ready(), ready=True)

    async def model(self, request: Request) -> Response:
        name, version = _named(request)
        find_model(self._serving, request.state.caller, name, version)
        return JSONResponse(model_metadata(name, self._settings))

    async def model_ready(self, request: Request) -> Response:
        name, version = _named(request)
        model = find_model(self._serving, request.state.caller, name, version)
        return _yes(model.ready(), name=name, ready=True)

    async def infer(self, request: Request) -> Response:
        raw, client = await request.body(), Client.of(request)
        aside = self._serving.aside(client)
        asked, binary = await aside.run(len(raw), self._read_infer, request, raw)
        started = await start(self._serving, client, asked, len(raw))
        tensors = await started.whole()
        envelope = self._envelope(request, asked.request.id)
        chosen = [binary.get(tensor.name, binary[""]) for tensor in tensors]
        cost = sum(tensor.cost for tensor in tensors)
        return await aside.run(cost, infer_response, envelope, tensors, chosen)

    async def generate(self, request: Request) -> Response:
        return await self._generate(request, streams=False)

    async def generate_stream(self, request: Request) -> Response:
        return await self._generate(request, streams=True)

    def _read_infer(self, request: Request, raw: bytes) -> tuple[Asked, dict[str, bool]]:
        """A request, and which of its outputs are binary; those that are not listed are as the empty name's."""
        text, behind = split(raw, request.headers)
        body = self._serving.parse(text, InferBody)
        parameters = dict(body.parameters or {})
        all_binary = parameters.pop(BINARY_OUTPUT, None) or False
        if not isinstance(all_binary, bool):
            raise InvalidRequest(f"{BINARY_OUTPUT}: Input should be a valid boolean", BINARY_OUTPUT)
        binary = {"": all_binary}
        for output in body.outputs or ():
            own = None if output.parameters is None else output.parameters.binary_data
            binary[output.name] = binary[""] if own is None else own
        name, version = _named(request)
        inputs = read_inputs(body, behind, self._serving.settings.limits)
        names = [output.name for output in body.outputs or ()]
        asked = InferRequest(name, version, body.id or "", inputs, parameters, names)
        return ask(self._serving, asked, streams=False), binary

    async def _generate(self, request: Request, streams: bool) -> Response:
        raw, client, serving = await request.body(), Client.of(request), self._serving
        asked, prompt_name = await serving.aside(client).run(len(raw), self._read_generate, request, raw, streams)
        body, named = asked.body, asked.request
        within(client, asked.timeout)
        model = await use_model(serving, client, named.model, named.version)
        envelope = self._envelope(request, named.id)
        options, tokenizer = response_options(named.id, body, model), model.backend.tokenizer
        frames = GenerateFrames(options, tokenizer, envelope, prompt_name)
        prepared = await serving.preparation(client, model, len(raw)).generation(body)
        return await serving.respond(client, model, body, len(raw), prepared, frames)

    def _read_generate(self, request: Request, raw: bytes, streams: bool) -> tuple[Asked, str]:
        """A request, and what it calls its prompt."""
        values = read_object(raw, self._serving.settings.limits)
        body = self._serving.check(values, GenerateBody)
        parameters = body.parameter_values()
        name, text = body.the_prompt()
        named, version = _named(request)
        asked = InferRequest(named, version, body.id or "", (), parameters | {"prompt": text}, ())
        checked = ask(self._serving, asked, streams)
        if (checked.body.n or 1) > 1:
            raise InvalidRequest("n should be 1: generate returns one completion, infer several.", "n")
        return checked, name

    def _envelope(self, request: Request, id: str) -> dict[str, Any]:
        name, _ = _named(request)
        named = {"model_name": name, "model_version": self._settings.model_version}
        return named | ({"id": id} if id else {})


def _named(request: Request) -> tuple[str, str]:
    """The model and the version in a path."""
    return request.path_params["id"], request.path_params.get("version", "")


def _yes(problem: str | None, **values: object) -> Response:
    if problem:
        raise Unavailable(f"The server is not ready: {problem}.", retry_after=5)
    return JSONResponse(values)
