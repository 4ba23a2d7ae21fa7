"""Upstreams that speak KServe v2 over gRPC: ModelStreamInfer, or ModelInfer where there is no other."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from bdh_batch.errors import ConfigError
from bdh_batch.messages import FinishReason
from bdh_batch.system.protobuf import Counter, TooMany
from bdh_batch.upstreams.config import KServeUpstream, Tensor
from bdh_batch.upstreams.protocol import (
    KINDS,
    MOST,
    EndpointFacts,
    Fault,
    FaultKind,
    Piece,
    TextRequest,
    reason_of,
    token_ids,
)
from bdh_batch.upstreams.tensors import ResponseTensors, add_input, add_parameter, new_request

SERVICE = "/inference.GRPCInferenceService"
OURS = "bdh_batch"  # what a server like this one calls itself
FINGERPRINT = "x-model-fingerprint"  # in the metadata of its ModelMetadata
UNFINISHED = ("", "null")  # finish reasons of responses before the last
FINAL = "triton_final_response"  # Triton's parameter of a stream's last response
ERROR_STATUS, ERROR_PARAM = "error_status", "error_param"  # parameters of a response with an error
USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")
ESTIMATED = "usage_estimated"  # says of these, in a server like this one, that they are no more than estimates
BELIEVED_SECONDS = 60.0  # that an endpoint has no ModelStreamInfer: then it is tried again
UNCOUNTED = 16384  # bytes of a message of which the parser has soon made all that is in it
MOST_FIELDS, MOST_NUMBERS = 8192, 2**19  # of a larger one: the parser holds up all streams until it has made them
LARGEST_REQUEST = 2**28  # bytes: the body's own limit is narrower
# The fields of /v1/completions that a server like this one takes as parameters, but for those that are done on this
# side, and those whose outcome is not passed back.
OURS_TAKES = frozenset(
    (
        *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "priority", "logit_bias", "cache_salt"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos"),
        *("stop_token_ids", "allowed_token_ids", "bad_words", "skip_special_tokens", "truncate_prompt_tokens"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        "add_special_tokens",
    )
)
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: FaultKind.REFUSED,
    grpc.StatusCode.OUT_OF_RANGE: FaultKind.REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: FaultKind.REFUSED,
    grpc.StatusCode.NOT_FOUND: FaultKind.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: FaultKind.UNAUTHORIZED,
    grpc.StatusCode.PERMISSION_DENIED: FaultKind.UNAUTHORIZED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: FaultKind.BUSY,
    grpc.StatusCode.DEADLINE_EXCEEDED: FaultKind.FIRST_TOKEN_TIMEOUT,
    grpc.StatusCode.CANCELLED: FaultKind.CLOSED,
    grpc.StatusCode.DATA_LOSS: FaultKind.MALFORMED,
}


class KServeConnector:
    """Speaks KServe v2."""

    takes_messages = False
    stops = False

    def __init__(self, upstream: KServeUpstream) -> None:
        self._upstream = upstream
        key = upstream.key()
        authorization = {} if key is None else {"authorization": f"Bearer {key}"}
        self._metadata = {**upstream.headers, **authorization}
        self._credentials = _credentials(upstream)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._without_stream: dict[str, float] = {}  # endpoints without ModelStreamInfer, until when that is believed

    def expresses(self, chat: bool, ours: bool) -> Collection[str]:
        return OURS_TAKES if ours else frozenset((*self._upstream.inputs, *self._upstream.parameters))

    async def stream(self, address: str, request: TextRequest) -> AsyncGenerator[Piece, None]:
        streams, request = self._upstream.streaming, self._identified(request)
        if streams or (streams is None and time.monotonic() >= self._without_stream.get(address, 0)):
            try:
                async for piece in self._streamed(address, request):
                    yield piece
                return
            except Unimplemented as error:
                if streams:
                    raise Fault(FaultKind.ERROR, "it has no ModelStreamInfer") from error
                self._without_stream[address] = time.monotonic() + BELIEVED_SECONDS
        yield await self._whole(address, self._request(request, streams=False), request)

    async def probe(self, address: str) -> EndpointFacts:
        channel = await self._channel(address)
        try:
            ready, _ = await self._told(channel, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
            if not ready.ready:
                raise Fault(FaultKind.BUSY, "not ready")
            about, _ = await self._told(
                channel, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse
            )
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Fault(FaultKind.CONNECT) from error
            return EndpointFacts()  # it responds, and need not have these methods
        if about.name != OURS:
            return EndpointFacts()
        return EndpointFacts(True, await self._fingerprint(channel))

    async def _fingerprint(self, channel: grpc.aio.Channel) -> str | None:
        """Returns the fingerprint of the model at a server like this one; None where it does not generate itself."""
        upstream = self._upstream
        name = upstream.stream_model or upstream.model or upstream.id
        asked = pb.ModelMetadataRequest(name=name, version=upstream.version)
        try:
            _, metadata = await self._told(channel, "ModelMetadata", asked, pb.ModelMetadataResponse)
        except grpc.RpcError:
            return None  # not for this key, or not now: then a request is told so
        said = metadata.get(FINGERPRINT)
        return said if isinstance(said, str) else None

    async def _told(
        self, channel: grpc.aio.Channel, method: str, asked: Any, kind: Any
    ) -> tuple[Any, Mapping[str, str | bytes]]:
        """Returns what a method says of the endpoint, and the metadata behind it. Raises Fault, grpc.RpcError."""
        ask = channel.unary_unary(f"{SERVICE}/{method}", asked.__class__.SerializeToString, None)
        call = ask(asked, metadata=tuple(self._metadata.items()), timeout=self._upstream.connect_seconds)
        return _parsed(kind, await call), dict(await call.trailing_metadata())

    async def prompt_ids(self, address: str, request: TextRequest) -> Sequence[int] | None:
        special = {name: value for name, value in request.fields.items() if name == "add_special_tokens"}
        fields = {"max_tokens": 1, "return_token_ids": True, **special}
        wanted = self._identified(replace(request, messages=None, fields=fields, ours=True))
        asked = self._request(wanted, streams=False)
        asked.outputs.add(name="prompt_token_ids")
        response = await self._infer(address, asked, wanted)
        tensors = ResponseTensors(response)
        name = tensors.find(["prompt_token_ids"])
        return None if name is None else token_ids(tensors.integers(name))

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    async def _channel(self, address: str) -> grpc.aio.Channel:
        """Returns a channel that is connected. Raises Fault where it cannot be."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._open(address)
        if channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            await self._connected(channel)
        return channel

    async def _connected(self, channel: grpc.aio.Channel) -> None:
        try:
            async with asyncio.timeout(self._upstream.connect_seconds):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise Fault(FaultKind.CONNECT)
                    await channel.wait_for_state_change(state)
        except TimeoutError as error:
            raise Fault(FaultKind.CONNECT_TIMEOUT) from error

    def _open(self, address: str) -> grpc.aio.Channel:
        options = [
            ("grpc.max_receive_message_length", self._upstream.max_message_bytes),
            ("grpc.max_send_message_length", LARGEST_REQUEST),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),  # what is asked again, and where, is decided here
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if self._credentials is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, self._credentials, options)

    def _identified(self, request: TextRequest) -> TextRequest:
        """Returns a request with the id that the upstream gets: clients may choose theirs, and two the same one."""
        return request if self._upstream.pass_request_id else replace(request, id=uuid4().hex)

    def _request(self, request: TextRequest, streams: bool) -> Any:
        """Returns the message for a request. Raises Fault where it cannot be expressed."""
        upstream = self._upstream
        model = (upstream.stream_model if streams else None) or upstream.model or upstream.id
        made = new_request(model, upstream.version, request.id)
        if isinstance(request.prompt, str):
            add_input(made, upstream.prompt, "prompt", request.prompt)
        elif request.ours:
            add_input(made, Tensor(name="prompt", datatype="INT32"), "prompt", [*(request.prompt or ())])
        else:
            raise Fault(FaultKind.REFUSED, "it takes texts, not token ids", "prompt")
        for name, value in request.fields.items():
            if not request.ours and (tensor := upstream.inputs.get(name)) is not None:
                add_input(made, tensor, name, value)
            else:
                add_parameter(made, name, value)
        return made

    def _call_metadata(self, request: TextRequest) -> tuple[tuple[str, str], ...]:
        return tuple({**request.headers, **self._metadata}.items())

    async def _streamed(self, address: str, request: TextRequest) -> AsyncGenerator[Piece, None]:
        asked = self._request(request, streams=True)
        channel = await self._channel(address)
        method = channel.stream_stream(f"{SERVICE}/ModelStreamInfer", asked.__class__.SerializeToString, None)
        call = method(metadata=self._call_metadata(request))
        reader = _Reader(self._upstream, request.id)
        try:
            await call.write(asked)
            await call.done_writing()
            async for message in call:
                piece = reader.read(_parsed(pb.ModelStreamInferResponse, message))
                yield piece
            reader.end()
            if not reader.has_reasons and reader.begun:
                yield Piece(finish_reason=FinishReason.STOP)  # it never says why
        except grpc.RpcError as error:
            raise _fault(error, reader.begun) from error
        except asyncio.InvalidStateError as error:  # the call ended while the request was being written
            raise await _ended(call, error) from error
        finally:
            call.cancel()

    async def _whole(self, address: str, asked: Any, request: TextRequest) -> Piece:
        reader = _Reader(self._upstream, request.id)
        response = await self._infer(address, asked, request)
        piece = reader.read_tensors(response)
        reader.end()
        piece.finish_reason = piece.finish_reason or FinishReason.STOP
        return piece

    async def _infer(self, address: str, asked: Any, request: TextRequest) -> Any:
        channel = await self._channel(address)
        method = channel.unary_unary(f"{SERVICE}/ModelInfer", asked.__class__.SerializeToString, None)
        try:
            message = await method(asked, metadata=self._call_metadata(request))
        except grpc.RpcError as error:
            fault = _fault(error, begun=False)
            if isinstance(fault, Unimplemented):
                fault = Fault(FaultKind.ERROR, "it has no ModelInfer for this model")
            raise fault from error
        return _parsed(pb.ModelInferResponse, message)


class Unimplemented(Exception):
    """Raised where an endpoint has no such method."""


class _Reader:
    """Makes pieces of the responses to one request."""

    def __init__(self, upstream: KServeUpstream, id: str) -> None:
        self._outputs = upstream.outputs
        self._id = id
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self.begun = False
        self.has_reasons = False  # whether responses say why they end

    def read(self, response: Any) -> Piece:
        """Returns what a response of a stream says. Raises Fault."""
        if response.error_message:
            raise _reported(response)
        self.begun = True
        return self.read_tensors(response.infer_response)

    def read_tensors(self, response: Any) -> Piece:
        """Returns what a response says. Raises Fault."""
        if response.id not in ("", self._id):
            raise Fault(FaultKind.WRONG_REQUEST)
        tensors, outputs = ResponseTensors(response), self._outputs
        piece = Piece()
        if (name := tensors.find(outputs.text)) is not None:
            piece.text = self._decoded(tensors.text(name))
        if (name := tensors.find(outputs.token_ids)) is not None:
            piece.tokens = token_ids(tensors.integers(name))
            piece.count = len(piece.tokens)
        if (name := tensors.find(outputs.finish_reason)) is not None:
            self.has_reasons = True
            said = tensors.text(name).decode(errors="replace")
            piece.finish_reason = None if said in UNFINISHED else reason_of(said)
        elif FINAL in response.parameters and response.parameters[FINAL].bool_param and not response.outputs:
            piece.finish_reason = FinishReason.STOP
        elif not (piece.text or response.outputs):
            raise Fault(FaultKind.MALFORMED, "a response without tensors")
        for name in USAGE:
            if tensors.find([name]) is not None:
                setattr(piece, name, _tokens(name, sum(tensors.integers(name))))
        piece.estimated = tensors.find([ESTIMATED]) is not None and tensors.flag(ESTIMATED)
        return piece

    def end(self) -> None:
        """Raises Fault where the text ended inside a character."""
        self._decoded(b"", final=True)

    def _decoded(self, said: bytes, final: bool = False) -> str:
        try:
            return self._utf8.decode(said, final)
        except UnicodeDecodeError:
            raise Fault(FaultKind.MALFORMED, "not UTF-8") from None  # the error has the text, which is not logged


def _tokens(name: str, number: int) -> int:
    if not 0 <= number <= MOST:
        raise Fault(FaultKind.MALFORMED, f"{name} is no number of tokens")
    return number


def _parsed(kind: Any, message: bytes) -> Any:
    """Returns a message that the stubs' own parser would log as a fault of this program where it is none."""
    if len(message) > UNCOUNTED:
        try:
            Counter(MOST_FIELDS, MOST_NUMBERS).run(message, kind.DESCRIPTOR)
        except TooMany as error:
            raise Fault(FaultKind.TOO_LARGE, str(error)) from None
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise Fault(FaultKind.MALFORMED, "no message") from error


def _reported(response: Any) -> Fault:
    """Returns what a response with an error means: a server like this one says which status it has over HTTP."""
    said = response.infer_response.parameters
    status = said[ERROR_STATUS].int64_param if ERROR_STATUS in said else 0
    kind = KINDS.get(status, FaultKind.ERROR)
    param = said[ERROR_PARAM].string_param if ERROR_PARAM in said else None
    return Fault(kind, response.error_message, param)


def _fault(error: grpc.RpcError, begun: bool) -> Fault | Unimplemented:
    """Returns what a status means. The upstream's own words go to clients only where they are about the request."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNIMPLEMENTED and not begun:
        return Unimplemented(details)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Fault(FaultKind.CLOSED if begun else FaultKind.CONNECT)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return Fault(FaultKind.TOO_LARGE)
    if code is grpc.StatusCode.INTERNAL and "RST_STREAM" in details:
        return Fault(FaultKind.CLOSED)
    kind = CODES.get(code, FaultKind.ERROR)
    return Fault(kind, details if kind is FaultKind.REFUSED else "")


async def _ended(call: Any, error: Exception) -> Fault | Unimplemented:
    code, details = await call.code(), await call.details()
    ended = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    return _fault(ended, begun=False)


def _credentials(upstream: KServeUpstream) -> grpc.ChannelCredentials | None:
    if not upstream.tls:
        return None
    try:
        roots = None if upstream.ca_file is None else upstream.ca_file.read_bytes()
    except OSError as error:
        raise ConfigError(f"upstreams.{upstream.id}.ca_file: {upstream.ca_file} cannot be read: {error}") from error
    return grpc.ssl_channel_credentials(roots)
