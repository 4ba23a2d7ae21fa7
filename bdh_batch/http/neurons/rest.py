"""The handlers of /v1/neurons (`http/endpoints.py`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.errors import NotFound
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.neurons.objects import NeuronContexts, NeuronMap, Study
from bdh_batch.http.neurons.study_file import FILE, Neuron, StudyFile, Unusable
from bdh_batch.http.request.body import check_query
from bdh_batch.http.request.client import Client
from bdh_batch.http.request.off_loop import LARGE
from bdh_batch.http.serving import Serving

MAKE = f"bdh-batch model neurons --out …/{FILE.parent}"
NUMBERS = ("layer", "head", "neuron")
LONGEST_NUMBER = 9  # digits
READING = LARGE + 1  # of a file, which may take as long as a disk does


class NeuronMaps:
    """Handles the requests to /v1/neurons."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def show(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "model")
        client = Client.of(request)
        model = await self._serving.model(client, request.query_params.get("model"))
        folder, (layers, heads, per_head) = _neurons_of(model)
        study = await self._serving.aside(client).run(READING, _study, folder, (layers, heads, per_head))
        sizes = {"layers": layers, "heads": heads, "neurons_per_head": per_head}
        most = self._serving.settings.limits.max_neurons
        return _json(NeuronMap(model=model.name, **sizes, max_neurons=most, study=study))

    async def contexts(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "model", *NUMBERS)
        client = Client.of(request)
        model = await self._serving.model(client, request.query_params.get("model"))
        folder, shape = _neurons_of(model)
        layer, head, neuron = (_number(request, name, most) for name, most in zip(NUMBERS, shape, strict=True))
        find = partial(_contexts, folder, shape, (layer, head, neuron))
        return _json(await self._serving.aside(client).run(READING, find))


def _neurons_of(model: ServedModel) -> tuple[Path, Neuron]:
    """A model's folder, and its layers, heads, and neurons of a head."""
    if model.folder is None or model.layout is None:
        text = f"The model {model.name!r} is not computed by this server, which cannot show its neurons."
        raise NotFound(text, "model", "not_found")
    layers, *_, heads, per_head, _ = model.layout.shape
    return model.folder, (layers, heads, per_head)


def _number(request: Request, name: str, below: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        raise InvalidRequest(f"{name}: is missing.", name)
    if not (text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER and int(text) < below):
        raise InvalidRequest(f"{name}: should be 0 to {below - 1}.", name)
    return int(text)


def _study(folder: Path, shape: Neuron) -> Study | None:
    """What a usable file says; None where there is none."""
    try:
        with StudyFile.opened(folder, shape) as file:
            return None if file is None else file.study
    except Unusable:
        return None  # /v1/neurons/contexts says why


def _contexts(folder: Path, shape: Neuron, neuron: Neuron) -> NeuronContexts:
    try:
        with StudyFile.opened(folder, shape) as file:
            if file is not None:
                return file.find(neuron)
    except Unusable as error:
        raise NotFound(f"The model's {FILE} {error}.", "model", "not_found") from error
    raise NotFound(f"The model has no {FILE}; `{MAKE}` makes it.", "model", "not_found")


def _json(value: NeuronMap | NeuronContexts) -> Response:
    return Response(value.model_dump_json(), media_type="application/json")
