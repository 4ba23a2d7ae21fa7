"""An inference request, from its tensors to the generation that responds to it, over REST and gRPC alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_batch.backends.base import Generation
from bdh_batch.errors import InvalidRequest, ModelNotFound
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.gate import HostedModel, ServedModel
from bdh_batch.http.request.client import LONGEST_TIMEOUT, Client
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses.generation import CHARACTERS, CHOICE_COST, collect
from bdh_batch.http.schema.requests import CompletionBody
from bdh_batch.http.serving import Serving, response_options
from bdh_batch.http.tensors.outputs import Outputs, selection
from bdh_batch.http.tensors.parameters import body_values
from bdh_batch.http.tensors.tensor import Tensor

TIMEOUT = "timeout"  # a parameter of Triton's protocol: microseconds that the request may take
FINAL = "triton_enable_empty_final_response"  # as Triton has it: streams here end with such a response in any case
IGNORABLE = {FINAL}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request as it came.

    Args:
        model: its name; empty is the one there is.
        version: of the model; empty is any.
        outputs: the names of those that are returned; none is all.
    """

    model: str
    version: str
    id: str
    inputs: Sequence[Tensor]
    parameters: Mapping[str, Any]
    outputs: Sequence[str]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was checked.

    Args:
        selected: the outputs that are returned.
        timeout: seconds that it gives itself.
        streamed: whether the response is a stream.
    """

    request: InferRequest
    body: CompletionBody
    selected: frozenset[str]
    timeout: float | None
    streamed: bool


@dataclass(frozen=True, slots=True)
class Started:
    """A generation under way, and what makes its output tensors."""

    generation: Generation
    outputs: Outputs
    client: Client
    aside: Aside
    model: ServedModel
    asked: Asked

    async def whole(self) -> Sequence[Tensor]:
        """The output tensors of the whole response. Raises BDHError, ClientDisconnect."""
        ends = await collect(self.generation, self.client)
        prompts, outputs = self.generation.prompts, self.outputs
        cost = outputs.cost(prompts, ends) + sum([CHOICE_COST + len(end.text) // CHARACTERS for end in ends])
        usage = self.generation.usage(sum(len(end.tokens) for end in ends))
        return await self.aside.run(cost, outputs.tensors, prompts, usage, ends)

    @property
    def model_name(self) -> str:
        return self.asked.request.model or self.model.name


def ask(serving: Serving, request: InferRequest, streams: bool) -> Asked:
    """Checks a request.

    Args:
        streams: whether its method streams; a request can ask it for a whole response then.

    Raises:
        InvalidRequest
    """
    parameters = {name: value for name, value in request.parameters.items() if name not in IGNORABLE}
    timeout = _seconds(parameters.pop(TIMEOUT, None))
    values = body_values(request.inputs, parameters, serving.settings.limits)
    if streams and values.get("stream") is None:
        values["stream"] = True
    body = serving.check(values | {"model": request.model or None}, CompletionBody)
    if body.stream and not streams:
        text = "stream cannot be used here: ModelStreamInfer and generate_stream stream their responses."
        raise InvalidRequest(text, "stream")
    streamed = bool(body.stream)
    return Asked(request, body, selection(request.outputs, streamed, body), timeout, streamed)


async def start(serving: Serving, client: Client, asked: Asked, size: int) -> Started:
    """Starts what was asked for, whose request has `size` bytes. Raises as a request to /v1/completions does."""
    body, request = asked.body, asked.request
    within(client, asked.timeout)
    model = await use_model(serving, client, request.model, request.version)
    options = response_options(request.id, body, model)
    outputs = Outputs(options, model.backend.tokenizer, asked.selected)
    prepared = await serving.preparation(client, model, size).generation(body)
    if prepared.grammar is not None:
        outputs.warn(prepared.grammar.warnings)
    generation = await serving.start(client, model, prepared, body, size)
    return Started(generation, outputs, client, serving.aside(client), model, asked)


def within(client: Client, timeout: float | None) -> None:
    """Gives the client's request the shorter of its timeout and this one, in seconds. Raises InvalidRequest."""
    given = [each for each in (client.timeout, timeout) if each is not None]
    client.given_timeout = min(given, default=None)


def find_model(serving: Serving, caller: Caller, name: str, version: str) -> HostedModel:
    """The model of that name and version, for a caller. Raises ModelNotFound, Forbidden, Unavailable."""
    model = serving.gate.find(caller, name or None)
    known = serving.settings.kserve.model_version
    if version not in ("", known):
        name = name or model.info.name
        raise ModelNotFound(f"{name}/versions/{version[:128]}", (f"{name}/versions/{known}",))
    return model


async def use_model(serving: Serving, client: Client, name: str, version: str) -> ServedModel:
    """The same, loaded for as long as the client's request is served. Raises as `Serving.model` does."""
    find_model(serving, client.caller, name, version)
    return await serving.model(client, name or None)


def _seconds(microseconds: Any) -> float | None:
    if microseconds is None or microseconds == 0:
        return None
    if type(microseconds) is not int or microseconds < 0:
        raise InvalidRequest("timeout: Input should be a number of microseconds, 0 or more", TIMEOUT)
    return float(min(microseconds / 1e6, LONGEST_TIMEOUT))
