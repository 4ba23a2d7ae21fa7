"""The gRPC server: its port, TLS, bounds, health and reflection."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bdh_batch.errors import ConfigError
from bdh_batch.http.auth.access import Admission
from bdh_batch.http.errors import Unauthorized
from bdh_batch.http.serving import Serving
from bdh_batch.kserve.calls import Calls
from bdh_batch.kserve.health import Health
from bdh_batch.kserve.service import SERVICE, Service
from bdh_batch.kserve.streams import Streams, in_time
from bdh_batch.settings import Settings

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # for responses that are being written when the server closes
PROBES = 256  # calls beside those of `kserve.max_calls`, which are for health and reflection
KEEPALIVE_MS = 60_000  # of silence, after which a client has to say that it is there
KEEPALIVE_TIMEOUT_MS = 20_000
LEAST_PING_MS = 5_000  # between two pings of a client


class KServeServer:
    """Serves gRPC at `kserve.grpc_port`."""

    def __init__(self, serving: Serving) -> None:
        self._settings = serving.settings
        calls = Calls(serving)
        self._streams = Streams(serving, calls)
        self._health = Health({"", SERVICE}, serving.gate.ready)
        protects = serving.settings.auth.protect_docs
        self._server = aio.server(
            interceptors=[
                _Others(calls, serving.admission if protects else None, serving.settings.kserve.idle_seconds)
            ],
            options=options(serving.settings),
            maximum_concurrent_rpcs=serving.settings.kserve.max_calls + PROBES,
        )
        handlers = Service(serving, calls, self._streams).handlers()
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Takes calls from now on. Raises ConfigError: it cannot listen."""
        chosen, server = self._settings.kserve, self._settings.server
        host = chosen.grpc_host or server.host
        address = f"{f'[{host}]' if ':' in host else host}:{chosen.grpc_port}"
        credentials = _credentials(self._settings)
        try:
            if credentials is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(f"kserve.grpc_port: cannot listen on {address}") from error
        await self._server.start()
        log.info("gRPC at %s%s", address, "" if credentials is None else ", with TLS")

    def drain(self) -> None:
        """Streams end when the requests that they have are done. New requests are refused by the gate."""
        self._streams.drain()
        self._health.close()

    async def close(self) -> None:
        """Takes no more calls, and cuts off those that are not done in CLOSE_SECONDS. Idempotent."""
        self.drain()
        await self._server.stop(CLOSE_SECONDS)


def options(settings: Settings) -> list[tuple[str, int]]:
    """gRPC's own bounds."""
    limits, chosen = settings.limits, settings.kserve
    return [
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.max_concurrent_streams", chosen.max_calls),
        ("grpc.max_allowed_incoming_connections", chosen.max_connections),
        ("grpc.max_connection_idle_ms", int(limits.keep_alive_seconds * 1000)),
        ("grpc.server_handshake_timeout_ms", int(limits.header_seconds * 1000)),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_MS),
        ("grpc.so_reuseport", int(settings.server.workers > 1)),
    ]


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The certificate of HTTPS, which was looked at when that was opened."""
    cert, key = settings.server.tls_cert, settings.server.tls_key
    if cert is None or key is None:
        return None
    return grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])


class _Others(aio.ServerInterceptor):  # type: ignore[misc]
    """Counts the streams of the other services, which clients may hold open, for their address.

    Args:
        admission: asks for a key where the API is described; None asks for none.
        idle_seconds: that a client may take for its next request.
    """

    def __init__(self, calls: Calls, admission: Admission | None, idle_seconds: float) -> None:
        self._calls = calls
        self._admission = admission
        self._idle_seconds = idle_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(f"/{SERVICE}/") or not handler.response_streaming:
            return handler
        closed = self._admission is not None and handler_call_details.method.startswith("/grpc.reflection.")
        return _Streaming(handler, self._calls, self._admission if closed else None, self._idle_seconds)


class _Streaming(grpc.RpcMethodHandler):  # type: ignore[misc]
    """A handler whose responses are a stream, which is counted while it is open."""

    def __init__(self, handler: Any, calls: Calls, admission: Admission | None, idle_seconds: float) -> None:
        self.request_streaming, self.response_streaming = handler.request_streaming, True
        self.request_deserializer = handler.request_deserializer
        self.response_serializer = handler.response_serializer
        self.unary_unary = self.stream_unary = None
        self.unary_stream = None if handler.unary_stream is None else self._counted
        self.stream_stream = None if handler.stream_stream is None else self._counted
        self._inner = handler.unary_stream or handler.stream_stream
        self._calls, self._admission, self._idle_seconds = calls, admission, idle_seconds

    async def _counted(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async with self._calls.ends(context):
            call = self._calls.call(context)
            with self._calls.one_of(call.address, probe=True):
                if self._admission is not None and self._admission.caller(call.key, call.address) is None:
                    raise Unauthorized("Reflection asks for an API key (auth.protect_docs).")
                given = in_time(requests, self._idle_seconds) if self.request_streaming else requests
                async for response in self._inner(given, context):
                    yield response
