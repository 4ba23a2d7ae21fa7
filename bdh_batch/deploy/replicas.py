"""The processes of a server on Ray: what Ray calls in them.

Only a process that computes or serves HTTP imports torch and the rest of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from starlette.types import ASGIApp

from bdh_batch.deploy.directory import REPORT_SECONDS, WAIT_SECONDS, Directory, Report
from bdh_batch.deploy.finder import Answer, Finder
from bdh_batch.errors import ConfigError
from bdh_batch.observability import logs
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.settings import Settings

if TYPE_CHECKING:
    from bdh_batch.deploy.engine import NetworkEngine

log = logging.getLogger(__name__)

UNREACHABLE = (RayError, RayServeException, ConnectionError, TimeoutError)
ASK_SECONDS = 3 * WAIT_SECONDS  # that the directory may take to respond: it may have to be started anew
HEAD_NODE = "node:__internal_head__"  # a resource that only the head node has
LEAVE_SECONDS, METRICS_SECONDS = 1.0, 2.0  # the same, where somebody waits


class DirectoryReplica:
    """The directory, in a process of its own. See `Directory`."""

    def __init__(self) -> None:
        self._directory = Directory(time.monotonic)

    async def report(self, report: Report) -> str | None:
        return self._directory.report(report)

    async def leave(self, name: str) -> None:
        self._directory.leave(name)

    async def drain(self) -> None:
        self._directory.drain()

    async def idle(self) -> bool:
        return self._directory.idle()

    async def wait(self, version: str) -> Answer:
        await self._directory.wait(version)
        return self._directory.version, self._directory.draining, self._directory.engines()

    async def metrics(self) -> Mapping[str, bytes]:
        return self._directory.metrics()

    async def figures(self) -> Mapping[str, bytes]:
        return self._directory.figures()


class DirectoryClient:
    """Asks the directory. What it cannot be asked raises one of UNREACHABLE.

    Args:
        handle: Ray's, of the deployment.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def report(self, report: Report) -> str | None:
        refusal: str | None = await self._ask(self._handle.report, ASK_SECONDS, report)
        return refusal

    async def leave(self, name: str) -> None:
        await self._ask(self._handle.leave, LEAVE_SECONDS, name)

    async def wait(self, version: str) -> Answer:
        answer: Answer = await self._ask(self._handle.wait, ASK_SECONDS, version)
        return answer

    async def metrics(self) -> Mapping[str, bytes]:
        return await self._pages(self._handle.metrics)

    async def figures(self) -> Mapping[str, bytes]:
        return await self._pages(self._handle.figures)

    async def _pages(self, method: DeploymentHandle[Any]) -> Mapping[str, bytes]:
        """Returns none where it cannot be asked."""
        try:
            pages: Mapping[str, bytes] = await self._ask(method, METRICS_SECONDS)
        except UNREACHABLE:
            return {}
        return pages

    @staticmethod
    async def _ask(method: DeploymentHandle[Any], seconds: float, *arguments: object) -> Any:
        async with asyncio.timeout(seconds):  # a request to a deployment that is gone waits without an end
            return await cast(DeploymentResponse[Any], method.remote(*arguments))


class Reporter:
    """Reports a process to the directory, from its opening to its closing.

    Args:
        make: returns the report.
    """

    def __init__(self, directory: DirectoryClient, make: Callable[[], Report]) -> None:
        self._refusal: str | None = None
        self._directory = directory
        self._make = make
        self._reporting = asyncio.create_task(self._report())

    @property
    def problem(self) -> str | None:
        """Why the process cannot take part, or None."""
        if self._reporting.done() and not self._reporting.cancelled():
            return f"its reports have ended: {self._reporting.exception()!r}"
        return self._refusal

    async def close(self) -> None:
        """Has the directory forget the process."""
        self._reporting.cancel()
        await asyncio.gather(self._reporting, return_exceptions=True)
        with contextlib.suppress(*UNREACHABLE):  # then it falls silent
            await self._directory.leave(self._make().name)

    async def _report(self) -> None:
        reachable = True
        while True:
            try:
                self._refusal = await self._directory.report(self._make())
                reachable = True
            except UNREACHABLE as error:
                if reachable:
                    log.warning("the directory cannot be reached: %s", error)
                reachable = False
            await asyncio.sleep(REPORT_SECONDS)


class EngineReplica:
    """An engine, in a process of its own.

    Raises:
        ConfigError, CheckpointError: it cannot start.
    """

    _reporter: Reporter | None = None  # until it has started

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, model: ModelSettings, number: int, secret: str, directory: DeploymentHandle[Any]
    ) -> None:
        from bdh_batch.deploy.engine import NetworkEngine

        _set_up_logs(model.settings, name := _own_name())
        self._settings = model.settings
        host, listed = ray.util.get_node_ip_address(), DirectoryClient(directory)  # type: ignore[no-untyped-call]
        self._engine = engine = await NetworkEngine.open(model, number, name, host, secret, _on_head())
        make = partial(_report_of_engine, engine)
        if (why := await listed.report(make())) is not None:
            await engine.close(0)
            raise ConfigError(f"the engine on the node {host} cannot take part: {why}")
        self._reporter = Reporter(listed, make)

    def check_health(self) -> None:
        """Raises RuntimeError where it cannot compute: Ray then replaces it."""
        assert self._reporter is not None
        if (problem := self._engine.health() or self._reporter.problem) is not None:
            raise RuntimeError(f"the engine is unhealthy: {problem}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._engine.stats(self._settings.ray.target_load)

    async def __del__(self) -> None:
        if self._reporter is None:
            return
        await self._reporter.close()
        await self._engine.close(self._settings.server.drain_seconds)


class FrontReplica:
    """A front end, in a process of its own."""

    _reporter: Reporter | None = None

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: Settings, secret: str, directory: DeploymentHandle[Any], *engines: DeploymentHandle[Any]
    ) -> None:
        from bdh_batch.deploy.front import Front

        _set_up_logs(settings, name := _own_name())
        self._settings = settings

        listed = DirectoryClient(directory)
        finder = partial(Finder, listed.wait, UNREACHABLE)
        self._front = front = await Front.open(settings, name, secret, finder, listed.metrics, listed.figures)
        self._reporter = Reporter(listed, lambda: Report(name, front.exposition(), front.figures(), idle=front.idle()))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._front.app

    def check_health(self) -> None:
        """Raises RuntimeError where it no longer follows the cluster: Ray then replaces it."""
        assert self._reporter is not None
        if (problem := self._front.problem() or self._reporter.problem) is not None:
            raise RuntimeError(f"the front end is unhealthy: {problem}")

    async def __del__(self) -> None:
        if self._reporter is None:
            return
        await self._reporter.close()
        await self._front.close(self._settings.server.drain_seconds)


def _report_of_engine(engine: NetworkEngine) -> Report:
    return Report(engine.listed.name, engine.exposition(), engine.figures().dump(), engine.listed)


def _on_head() -> bool:
    """Whether this process is on the node where the front ends are."""
    own = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return any(HEAD_NODE in node["Resources"] for node in nodes if node["NodeID"] == own)


def _own_name() -> str:
    context = serve.get_replica_context()
    return f"{context.deployment}-{context.replica_id.unique_id}"


def _set_up_logs(settings: Settings, name: str) -> None:
    server = settings.server
    as_json = server.log_format == "json"
    logs.set_up(server.log_level, as_json, as_json if server.access_log is None else server.access_log, name)
