"""The methods of `inference.GRPCInferenceService` that this server has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

from bdh_batch.errors import Unavailable
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.request.client import Client
from bdh_batch.http.serving import Serving
from bdh_batch.http.tensors.inference import InferRequest, ask, find_model, start
from bdh_batch.http.tensors.metadata import model_metadata, server_metadata
from bdh_batch.kserve.calls import Calls, Context
from bdh_batch.kserve.messages import check_labels, infer_request, infer_response, is_raw, parse
from bdh_batch.kserve.streams import Streams

SERVICE = "inference.GRPCInferenceService"
REQUEST_ID = "x-request-id"
FINGERPRINT = "x-model-fingerprint"  # metadata of ModelMetadata: the protocol has no field for it

Messages = AsyncIterator[bytes]
Method = Callable[[Client, Any], Awaitable[Message]]  # gets the client and the request, and returns the response
Open = Callable[[Any], Message]


class Service:
    """Handles the calls of the service.

    Messages come as bytes, and are parsed here: large ones off the event loop, and malformed ones with an error that
    says so. A method with one request takes the first message of its call.
    """

    def __init__(self, serving: Serving, calls: Calls, streams: Streams) -> None:
        self._serving = serving
        self._settings = serving.settings.kserve
        self._limits = serving.settings.limits
        self._calls = calls
        self._streams = streams

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """The handlers of all methods, by name."""
        pb = service_pb2
        return {
            "ServerLive": self._open(pb.ServerLiveRequest, self._live),
            "ServerReady": self._open(pb.ServerReadyRequest, self._ready),
            "ServerMetadata": self._open(pb.ServerMetadataRequest, self._metadata),
            "ModelReady": self._closed("ModelReady", pb.ModelReadyRequest, self._model_ready),
            "ModelMetadata": self._closed("ModelMetadata", pb.ModelMetadataRequest, self._model_metadata),
            "ModelInfer": self._closed("ModelInfer", pb.ModelInferRequest, self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }

    # Which calls are let in

    def _open(self, kind: type[Message], respond: Open) -> grpc.RpcMethodHandler:
        """A method that anyone may call: for probes."""

        async def handle(messages: Messages, context: Context) -> bytes:
            async with self._calls.ends(context):
                with self._calls.one_of(self._calls.call(context).address, probe=True):
                    raw = await self._calls.only_message(messages)
                    response = respond(parse(raw, kind, self._limits))
                    return bytes(response.SerializeToString())
            raise AssertionError

        return grpc.stream_unary_rpc_method_handler(handle)

    def _closed(self, name: str, kind: type[Message], respond: Method) -> grpc.RpcMethodHandler:
        """A method for callers."""
        route = f"/{SERVICE}/{name}"

        async def handle(messages: Messages, context: Context) -> bytes:
            async with self._calls.ends(context) as trailers:
                call = self._calls.call(context)
                with self._calls.request(call, route, call.header(REQUEST_ID) or "") as request:
                    trailers.append((REQUEST_ID, request.id))
                    try:
                        client = await self._calls.admit(request)
                        with self._calls.one_of(client.caller):
                            return await self._respond(client, messages, kind, respond)
                    finally:
                        trailers += request.standing.items()
            raise AssertionError

        return grpc.stream_unary_rpc_method_handler(handle)

    async def _respond(self, client: Client, messages: Messages, kind: type[Message], respond: Method) -> bytes:
        raw = await self._calls.only_message(messages)
        aside = self._serving.aside(client)
        with self._calls.holding(len(raw)):
            message = await aside.run(len(raw), parse, raw, kind, self._limits)
            response = await respond(client, message)
        size = response.ByteSize()
        return bytes(await aside.run(size, response.SerializeToString))

    # What they are responded to

    def _live(self, message: Any) -> Message:
        return service_pb2.ServerLiveResponse(live=self._serving.gate.health() is None)

    def _ready(self, message: Any) -> Message:
        return service_pb2.ServerReadyResponse(ready=self._serving.gate.ready() is None)

    def _metadata(self, message: Any) -> Message:
        return service_pb2.ServerMetadataResponse(**server_metadata())

    async def _model_ready(self, client: Client, message: Any) -> Message:
        return service_pb2.ModelReadyResponse(ready=self._is_ready(client.caller, message))

    def _is_ready(self, caller: Caller, message: Any) -> bool:
        check_labels(message, self._limits, "name", "version")
        try:
            return find_model(self._serving, caller, message.name, message.version).ready() is None
        except Unavailable:
            return False

    async def _model_metadata(self, client: Client, message: Any) -> Message:
        check_labels(message, self._limits, "name", "version")
        model = find_model(self._serving, client.caller, message.name, message.version)
        if (fingerprint := model.fingerprint) is not None:
            client.standing[FINGERPRINT] = fingerprint
        return service_pb2.ModelMetadataResponse(**model_metadata(message.name or model.info.name, self._settings))

    async def _infer(self, client: Client, message: Any) -> Message:
        aside, size = self._serving.aside(client), message.ByteSize()
        read: InferRequest = await aside.run(size, infer_request, message, self._limits)
        asked = await aside.run(size, ask, self._serving, read, False)
        started = await start(self._serving, client, asked, size)
        tensors = await started.whole()
        of = (started.model_name, self._settings.model_version, read.id, tensors, is_raw(message))
        response: Message = await aside.run(sum(each.cost for each in tensors), infer_response, *of)
        return response

    async def _stream(self, messages: Messages, context: Context) -> None:
        async with self._calls.ends(context) as trailers:
            call = self._calls.call(context)
            await self._streams.serve(call, messages, trailers)
