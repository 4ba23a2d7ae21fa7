"""gRPC's standard health service: the server, and the inference service, are serving when requests are accepted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

LOOK_SECONDS = 1.0  # between looks for a change, for those who watch
Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says whether the server is ready, to probes and load balancers.

    Args:
        services: their names; the empty one is the server's.
        problem: why no request is accepted, or None.
    """

    def __init__(self, services: set[str], problem: Callable[[], str | None]) -> None:
        self._services = services
        self._problem = problem
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Those who watch are told that the server goes."""
        self._closing.set()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - as the service has it
        """The status of a service."""
        if request.service not in self._services:
            await context.abort(StatusCode.NOT_FOUND, "There is no such service.")
        return Status(status=self._status())

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The statuses of all services."""
        statuses = {name: Status(status=self._status()) for name in self._services}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """The status of a service, and every change of it."""
        known = request.service in self._services
        said = None
        while True:
            status = self._status() if known else Status.SERVICE_UNKNOWN
            if status != said:
                said = status
                yield Status(status=status)
            if self._closing.is_set():
                return
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._closing.wait()
            except TimeoutError:
                continue

    def _status(self) -> Any:
        return Status.SERVING if self._problem() is None and not self._closing.is_set() else Status.NOT_SERVING
