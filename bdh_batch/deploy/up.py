"""`bdh-batch ray up`: starts or joins a cluster of Ray, runs the server there, and ends it on SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

# Ray reads these when it is imported. It reports to nobody, and what it says of itself is not what a server says.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from bdh_batch.deploy.checks import check, check_room, share_of
from bdh_batch.deploy.ray import QUIET, application
from bdh_batch.deploy.replicas import UNREACHABLE
from bdh_batch.errors import ConfigError
from bdh_batch.http.transport.server import tls_context
from bdh_batch.processes.model_settings import models_of
from bdh_batch.settings import Server, Settings

log = logging.getLogger(__name__)

NAME = "bdh-batch"  # of the application
SERVE = "SERVE_CONTROLLER_ACTOR"  # the name that it has in every cluster
PROXY_SECONDS = 30.0  # that the proxy may take to listen, once all else is ready
OBJECTS = 100 * 2**20  # bytes of Ray's object store, in which nothing of ours is
LOOK_SECONDS = 0.5
GONE_SECONDS = 15.0  # without an answer after which the head node counts as gone
LAST_WORDS_SECONDS = 5.0
LOST = 1  # the exit code


def up(
    settings: Settings,
    announce: Callable[[str, str], None],
    build: Callable[[Settings], serve.Application] = application,
) -> None:
    """Serves until SIGTERM or SIGINT; a second signal does not wait for the drain.

    Args:
        announce: is called with the base URL and the models' names once requests are accepted.
        build: makes the application of settings.

    Raises:
        ConfigError: it cannot start.
    """
    models = models_of(settings)
    check(settings, models)
    if not settings.server.port:
        raise ConfigError("server.port: Ray's proxy listens at the port that it is given; set one, not 0")
    tls_context(settings.server)
    shares = {model.name: share_of(model, len(models)) for model in models}
    _join(settings, sum(share.most * share.cpus for share in shares.values()))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(LOST) if stop.is_set() else stop.set())
    own = not _serve_runs()
    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        for text in check_room(shares, resources):
            log.warning("%s", text)
        _start_http(settings)
        _run(build(settings), settings, stop, partial(announce, _url(settings), ", ".join(shares)))
    except UNREACHABLE as error:
        raise ConfigError(f"ray.address: the Ray cluster has failed: {error}") from error
    finally:
        if own:
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _run(built: serve.Application, settings: Settings, stop: threading.Event, announce: Callable[[], None]) -> None:
    """Runs the application until `stop` is set. Raises ConfigError: it cannot start."""
    target = serve.RunTarget(built, NAME, "/", QUIET)
    serve.run_many([target], wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
    try:
        _wait_until_running(settings.ray.start_seconds, stop)
        if not stop.is_set():
            _check_address(settings.server)
            announce()
            _watch(stop)
            _drain(settings.server.drain_seconds)
    finally:
        serve.delete(NAME)


def _join(settings: Settings, cpus: int) -> None:
    """Starts a cluster on this machine, with room for so many CPUs, or joins another one. Raises ConfigError."""
    address = settings.ray.address
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {
            "address": "local",
            "num_cpus": max(cpus, os.cpu_count() or 1),
            "object_store_memory": OBJECTS,
            "include_dashboard": False,
        }
    elif address != "auto" and not _answers(address):
        raise ConfigError(f"ray.address: no head node of a Ray cluster answers at {address}")
    try:
        ray.init(**options, logging_level=logging.WARNING, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"ray.address: no Ray cluster could be joined at {address or 'local'} ({error})") from error


def _start_http(settings: Settings) -> None:
    """Has Ray's proxy listen. Raises ConfigError: it listens elsewhere already."""
    server = settings.server
    options: dict[str, Any] = {"host": server.host, "port": server.port}
    if server.tls_cert is not None:
        options |= {"ssl_certfile": str(server.tls_cert), "ssl_keyfile": str(server.tls_key)}
    if settings.ray.address is None:
        with socket.socket(
            socket.AF_INET6 if ":" in server.host else socket.AF_INET
        ) as probe:  # Ray's proxy would only say it in a log of its own
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((server.host, server.port))
            except OSError as error:
                text = f"{server.host}:{server.port} cannot be listened at ({error.strerror})"
                raise ConfigError(f"server.port: {text}") from error
    serve.start(proxy_location="HeadOnly", http_options=options, logging_config=QUIET)


def _serve_runs() -> bool:
    """Whether the cluster has Serve already, which then outlives this server."""
    try:
        ray.get_actor(SERVE, namespace="serve")
    except ValueError:
        return False
    return True


def _check_address(server: Server) -> None:
    """Raises ConfigError: nothing listens where it should, as Serve was there before, and listens elsewhere."""
    end = time.monotonic() + PROXY_SECONDS
    while not _answers(f"{server.host}:{server.port}"):
        if time.monotonic() > end:
            text = (
                "Ray's proxy does not listen there: Serve was started with another address (`serve shutdown` ends it)"
            )
            raise ConfigError(f"server.port: {server.host}:{server.port}: {text}, or this is not the head node")
        time.sleep(LOOK_SECONDS)


def _wait_until_running(seconds: float, stop: threading.Event) -> None:
    """Returns once requests are accepted, or `stop` is set. Raises ConfigError: something of it cannot start."""
    end = time.monotonic() + seconds
    while not stop.wait(LOOK_SECONDS):
        found = serve.status().applications.get(NAME)
        if found is not None and found.status == "RUNNING":
            return
        if found is not None and (reason := _reason(found)) is not None:
            raise ConfigError(reason)
        if time.monotonic() > end:
            states = "; ".join(_waiting(found)) or "Ray has not begun"
            raise ConfigError(f"ray.start_seconds: not all of it was ready within {seconds:g} s: {states}")


def _waiting(found: ApplicationStatusOverview | None) -> list[str]:
    """Says of each deployment that is not ready what its processes do."""
    if found is None:
        return []
    return [
        f"{name} is {deployment.status.value.lower()} "
        f"({', '.join(f'{count} {state.lower()}' for state, count in deployment.replica_states.items())})"
        f"{': ' + deployment.message.splitlines()[0] if deployment.message else ''}"
        for name, deployment in found.deployments.items()
        if deployment.status != "HEALTHY"
    ]


def _reason(found: ApplicationStatusOverview) -> str | None:
    """Returns why the server cannot start, or None: an error of ours, which would only come again, or what Ray says."""
    said = "\n".join([found.message, *(each.message for each in found.deployments.values())])
    ours: list[str] = re.findall(r"(?:ConfigError|CheckpointError|NotEnoughMemory): (.+)", said)
    if ours:
        return ours[-1]
    failed = found.status in ("DEPLOY_FAILED", "UNHEALTHY")
    return f"Ray cannot start the server: {said.strip()}" if failed else None


def _watch(stop: threading.Event) -> None:
    """Waits for a signal. Ends the process where the head node of the cluster is gone."""
    head = ray.get_runtime_context().gcs_address
    heard = time.monotonic()
    while not stop.wait(LOOK_SECONDS):
        if _answers(head):
            heard = time.monotonic()
        elif time.monotonic() - heard > GONE_SECONDS:
            log.critical("the head node of the Ray cluster at %s is gone: the server has ended with it", head)
            logging.shutdown()
            os._exit(LOST)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), LAST_WORDS_SECONDS).close()
    except (OSError, OverflowError):
        return False
    return True


def _drain(seconds: float) -> None:
    """Has front ends finish their requests, for so long at most."""
    log.info("draining for up to %.0f s", seconds)
    directory = serve.get_deployment_handle("directory", NAME)
    end = time.monotonic() + seconds
    try:
        directory.drain.remote().result(timeout_s=LAST_WORDS_SECONDS)
        while not directory.idle.remote().result(timeout_s=LAST_WORDS_SECONDS) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
    except UNREACHABLE as error:
        log.warning("the server ends without a drain: %s", error)


def _url(settings: Settings) -> str:
    server = settings.server
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"http{'' if server.tls_cert is None else 's'}://{host}:{server.port}"
