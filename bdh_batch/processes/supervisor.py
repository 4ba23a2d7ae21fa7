"""The supervisor of a server of several processes: front ends that share one port, and engines for each model.

SIGTERM and SIGINT end the front ends first, which drain, then the engines. SIGHUP replaces the engines one after the
other, under load: a new one is ready before the old one gets SIGTERM, and the old one's streams move to the engines
that stay.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bdh_batch.errors import BDHError, ConfigError
from bdh_batch.http.transport.listen import listen, release, url_of
from bdh_batch.processes.children import Child, Children, Role
from bdh_batch.processes.control import Connection, PidFile, default_pid_file, listen_for_commands
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.loaded_models import CannotLoad, LoadedModel, LoadedModels, State
from bdh_batch.processes.model_settings import ModelSettings, models_of
from bdh_batch.processes.placement import FreeCores, engine_roles
from bdh_batch.settings import Settings
from bdh_batch.store.temporary import temporary_folder

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # in which front ends connect to a new engine, before an old one is stopped
HANG_SECONDS, HANG_HEARTBEATS = 30.0, 6  # without a heartbeat, after which an engine is restarted: the longer of both


class Supervisor:
    """Starts the processes of one server, and restarts those that end.

    Args:
        command: the module that children are started as, and its arguments.
        on_ready: is called with the base URL and the models' names once a front end is ready.
    """

    def __init__(self, settings: Settings, command: Sequence[str], on_ready: Callable[[str, str], None]) -> None:
        self._models = models_of(settings)
        check(settings, self._models)
        self._settings = settings
        self._command = command
        self._on_ready = on_ready
        self._roles = engine_roles(self._models, settings.server.max_loaded_models)
        self._cores = FreeCores()
        self._connections: set[Connection] = set()
        self._stop = asyncio.Event()
        self._failed: ConfigError | None = None
        self._generation = 0
        self._reloading: asyncio.Task[None] | None = None
        self._announced = False

    async def run(self) -> None:
        """Runs the processes until SIGTERM or SIGINT.

        Raises:
            ConfigError: the sockets cannot be opened, or a process cannot start before any was ready.
        """
        server = self._settings.server
        self._listeners = listen(server)
        self._folder = RuntimeFolder.make()
        lock = self._folder.lock()
        self._stored = temporary_folder(self._settings.store) if self._settings.store.path is None else None
        hang_seconds = max(HANG_SECONDS, HANG_HEARTBEATS * self._settings.engine.heartbeat_seconds)
        self._children = Children(
            self._command, self._options, self._listeners, server.drain_seconds, hang_seconds, self._child_changed
        )
        self._loaded = LoadedModels(
            [
                LoadedModel(number, model.name, model.on_demand, model.keep_alive)
                for number, model in enumerate(self._models)
            ],
            server.max_loaded_models or len(self._models),
            self,
            self._announce,
            server.drain_seconds,
        )
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
        pid_file = None
        try:
            pid_file = self._pid_file()
            control = await listen_for_commands(self._folder.control, self._run_command, self._joined, self._left)
            self._loaded.start()
            for number in range(server.workers):
                self._children.add(Role("front", number), f"front-{number}", self._folder)
            await self._stop.wait()
            if self._reloading is not None:
                self._reloading.cancel()
            self._loaded.close()
            await self._children.end()
            control.close()
        finally:
            self._loaded.close()
            self._children.kill()
            for listener in self._listeners:
                release(listener, self._settings.server)
            if pid_file is not None:
                pid_file.remove()
            self._folder.remove()
            os.close(lock)
            if self._stored is not None:
                self._stored.remove()
        if self._failed is not None:
            raise self._failed

    async def start(self, model: int) -> None:
        """Starts the engines of a model, and returns when one is ready. Raises CannotLoad."""
        folder = self._folder.of_model(model)
        folder.make_anew()
        children = [self._add_engine(role, self._cores.take(role.threads)) for role in self._roles[model]]
        try:
            waiting = list(children)
            while waiting and not any(child.ready.is_set() for child in children):
                await _first(event for child in waiting for event in (child.ready, child.failed))
                waiting = [child for child in waiting if not child.failed.is_set()]
            if not any(child.ready.is_set() for child in children):
                report = next(child.report for child in children if child.report is not None)
                raise CannotLoad(str(report.problem), report.for_memory)
        except BaseException:
            await self.stop(model)
            raise

    async def stop(self, model: int) -> None:
        """Ends the engines of a model."""
        children = self._children.of("engine", model)
        await self._children.stop(children)
        for child in children:
            self._cores.give_back(child.cores)
        self._folder.of_model(model).remove()

    def give_back(self, model: int) -> None:
        """For a model that is held while its engines are replaced: it is released when they are."""

    def _add_engine(self, role: Role, cores: tuple[int, ...]) -> Child:
        name = f"engine-{role.number}-{self._generation}"
        return self._children.add(role, name, self._folder.of_model(role.model), cores)

    def _pid_file(self) -> PidFile | None:
        """Writes the pid file: that of the settings, or the default one, without which the server runs as well.

        Raises:
            ConfigError: the one of the settings cannot be written.
        """
        chosen = self._settings.server
        if chosen.pid_file is not None:
            return PidFile(chosen.pid_file, self._folder.path)
        port = 0 if chosen.uds is not None else int(self._listeners[0].getsockname()[1])
        try:
            return PidFile(default_pid_file(port, chosen.uds), self._folder.path)
        except ConfigError as error:
            log.warning("`bdh-batch reload` will not find this server: %s", error)
            return None

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._children.kill()  # a second signal does not wait for the drain
        self._stop.set()

    def _child_changed(self, child: Child) -> None:
        """A child is ready, or has ended before it was, which ends a server that can do nothing without it."""
        if child.ready.is_set():
            if child.role.kind == "front" and not self._announced:
                self._announced = True
                names = ", ".join(model.name for model in self._models)
                self._on_ready(url_of(self._listeners, self._settings.server), names)
            return
        assert child.report is not None
        needed = child.role.kind == "front" or len(self._models) == 1
        others = any(each.ready.is_set() for each in self._children.of(child.role.kind))
        if needed and not child.report.unsaid and not others and not self._announced:
            self._failed = ConfigError(f"the process {child.name} cannot start: {child.report.problem}")
            self._stop.set()

    def _options(self, child: Child) -> Mapping[str, str]:
        """What a child is told beside the supervisor's own command line."""
        options = {}
        if child.role.kind == "front" and self._stored is not None:
            options["store.path"] = str(self._stored.path)  # they share it, and it outlives each of them
        if child.role.device:
            options["model.device"] = child.role.device.partition(":")[0]
        if child.role.kind == "engine" and (trace := self._settings.scheduler.trace_file) is not None:
            options["scheduler.trace_file"] = f"{trace}.{child.name}"
        return options

    def _announce(self, model: LoadedModel) -> None:
        for connection in self._connections:
            connection.send(model=model.number, state=model.state)

    def _joined(self, connection: Connection) -> None:
        self._connections.add(connection)
        for model in self._loaded.models:
            connection.send(model=model.number, state=model.state)

    def _left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._loaded.leave(connection)

    async def _run_command(self, connection: Connection, command: str, argument: Any) -> None:
        """Runs a command of the control socket. Raises BDHError where it is unknown or fails."""
        match command, argument:
            case "reload", None:
                await self._reloaded()
            case "acquire", int(model) if 0 <= model < len(self._models):
                await self._loaded.acquire(connection, model)
            case "release", int(model) if 0 <= model < len(self._models):
                self._loaded.release(connection, model)
            case "load", int(model) if 0 <= model < len(self._models):
                await self._loaded.load(model)
            case "unload", int(model) if 0 <= model < len(self._models):
                await self._loaded.unload(model)
            case _:
                raise ConfigError(f"unknown command {command!r}")

    def _reload_soon(self) -> None:
        async def reload() -> None:
            try:
                await self._reloaded()
            except BDHError as error:
                log.error("%s", error)

        self._hangup = asyncio.create_task(reload())

    async def _reloaded(self) -> None:
        """Replaces the engines. Raises ConfigError where one does not start, or they are being replaced already."""
        if self._reloading is not None and not self._reloading.done():
            raise ConfigError("the engines are being replaced already")
        self._reloading = asyncio.create_task(self._reload())
        await asyncio.shield(self._reloading)

    async def _reload(self) -> None:
        """Replaces the engines of each model that is loaded, one after the other, until one does not get ready."""
        self._generation += 1
        for model in self._loaded.models:
            if model.state is State.LOADED:
                await self._loaded.acquire(self, model.number)
                try:
                    await self._replace_engines(model.number)
                finally:
                    self._loaded.release(self, model.number)
        log.info("all engines have been replaced")

    async def _replace_engines(self, model: int) -> None:
        for old in self._children.of("engine", model):
            new = self._add_engine(old.role, old.cores)
            await _first([new.ready, new.failed])
            if not new.ready.is_set():
                reason = new.report.problem if new.report is not None else ""
                await self._children.stop([new])
                raise ConfigError(f"the new engine {new.name} does not get ready ({reason}): {old.name} stays")
            await asyncio.sleep(SETTLE_SECONDS)
            await self._children.stop([old])


async def _first(events: Iterable[asyncio.Event]) -> None:
    """Waits until one of the events is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


def is_wanted(settings: Settings) -> bool:
    """Returns whether the settings need more than one process."""
    engine = settings.engine
    return settings.server.workers > 1 or bool(settings.models) or engine.replicas is not None or bool(engine.devices)


def check(settings: Settings, models: Sequence[ModelSettings]) -> None:
    """Checks that options fit several processes. Raises ConfigError where they do not."""
    rates, most = settings.rate_limiting, settings.server.max_loaded_models
    for model in models:
        engine, where = model.settings.engine, f"models ({model.name}): " if settings.models else "engine."
        if engine.replicas is not None and engine.devices and engine.replicas != len(engine.devices):
            text = f"{engine.replicas}, but {where}devices has {len(engine.devices)}: leave one of them out"
            raise ConfigError(f"{where}replicas: {text}")
    if settings.server.workers > 1 and rates.enabled and rates.storage == "memory":
        text = "each of several processes (server.workers) would count for itself in memory; set it to a redis:// URL"
        raise ConfigError(f"rate_limiting.storage: {text}")
    warm = sum(not model.on_demand for model in models)
    if most is not None and most < min(len(models), warm + 1):
        text = f"{most}, but {warm} are loaded when the server starts, and those on demand need room for one"
        raise ConfigError(f"server.max_loaded_models: {text}")
