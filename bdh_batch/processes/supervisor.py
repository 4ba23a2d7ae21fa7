"""The supervisor starts the other processes of a server: front ends that share one port, and engines.

A process that ends is started again; one that was not ready yet, after a wait that doubles. SIGTERM and SIGINT end
the front ends first, which drain, then the engines. SIGHUP replaces the engines one after the other, under load: a new
one is ready before the old one gets SIGTERM, and the old one's streams move to the engines that stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bdh_batch.errors import ConfigError
from bdh_batch.http.transport.listen import listen, release, url_of
from bdh_batch.processes.chosen_model import chosen_model, model_name
from bdh_batch.processes.control import PidFile, default_pid_file, listen_for_commands
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.settings import Settings
from bdh_batch.system.machine import usable_cores

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds until a process that ended before it was ready is started again
START_SECONDS = 600.0  # within which a process has to be ready; then it is killed
GRACE_SECONDS = 10.0  # after the drain, until a process that does not end is killed
SETTLE_SECONDS = 1.0  # in which front ends connect to a new engine, before an old one is stopped
NOT_STARTED = 127
CANNOT_START = 2  # exit status of a process that logs why


@dataclass(frozen=True, slots=True)
class Role:
    """What a child process does: which kind it is, and with which part of the machine.

    Args:
        kind: "engine" or "front".
        number: among those of its kind.
        device: that an engine computes on; empty is that of the settings.
        threads: that an engine computes with; None is as the settings say.
    """

    kind: str
    number: int
    device: str = ""
    threads: int | None = None


@dataclass(eq=False)
class Child:
    """A child process and its state. `wanted` is whether it is started again when it ends."""

    role: Role
    name: str
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    wanted: bool = True
    waiting: float = FIRST_WAIT
    watching: asyncio.Task[None] | None = None


class Supervisor:
    """Starts the processes of one server, and restarts those that end.

    Args:
        command: the module that children are started as, and its arguments.
        on_ready: is called with the base URL and the model's name once a front end is ready.
    """

    def __init__(self, settings: Settings, command: Sequence[str], on_ready: Callable[[str, str], None]) -> None:
        check(settings)
        with contextlib.closing(chosen_model(settings)) as located:
            self._model_name = model_name(settings, located)
        self._settings = settings
        self._command = command
        self._on_ready = on_ready
        self._children: list[Child] = []
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
        self._listeners = listen(self._settings.server)
        self._folder = RuntimeFolder.make()
        self._liveness, self._liveness_of_children = socket.socketpair()  # closes when this process ends
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
        pid_file = None
        try:
            pid_file = self._pid_file()
            self._control = await listen_for_commands(self._folder.path / "control", self._run_command)
            for role in [*engine_roles(self._settings), *front_roles(self._settings)]:
                self._add(role)
            await self._stop.wait()
            await self._end()
        finally:
            self._kill()
            for listener in self._listeners:
                release(listener, self._settings.server)
            if pid_file is not None:
                pid_file.remove()
            self._folder.remove()
        if self._failed is not None:
            raise self._failed

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
            self._kill()  # a second signal does not wait for the drain
        self._stop.set()

    def _add(self, role: Role) -> Child:
        name = f"{role.kind}-{role.number}" + (f"-{self._generation}" if role.kind == "engine" else "")
        child = Child(role, name)
        self._children.append(child)
        child.watching = asyncio.create_task(self._supervise(child))
        return child

    async def _supervise(self, child: Child) -> None:
        """Starts `child`, and restarts it whenever it ends, as long as it is wanted."""
        while child.wanted and not self._stop.is_set():
            try:
                status = await self._run(child)
            except OSError as error:  # the system has no process, memory or descriptor left
                log.error("the process %s cannot be started: %s", child.name, error)
                status = NOT_STARTED
            if not child.wanted or self._stop.is_set():
                return
            if status == CANNOT_START and not any(each.ready.is_set() for each in self._children):
                self._failed = ConfigError(f"the process {child.name} cannot start; its log above has the reason")
                self._stop.set()
                return
            how = f"status {status}" if status >= 0 else f"signal {-status}"
            log.error("the process %s ended (%s) and is restarted", child.name, how)
            if child.ready.is_set():
                child.waiting = FIRST_WAIT
            else:
                await self._sleep(child.waiting)
                child.waiting = min(2 * child.waiting, LONGEST_WAIT)
            child.ready.clear()

    async def _run(self, child: Child) -> int:
        """Runs the process of `child` and returns its exit status; that of a signal is its number, negative."""
        ready_read, ready_write = os.pipe()
        passed = [self._liveness_of_children.fileno(), ready_write]
        sockets = [listener.fileno() for listener in self._listeners] if child.role.kind == "front" else []
        spec = ":".join(map(str, [child.name, self._folder.path, *passed, *sockets]))
        command = [sys.executable, "-m", *self._command, *self._options(child), "--process", spec]
        try:
            child.process = process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[*passed, *sockets], env=environment(child.role), start_new_session=True
            )
        except OSError:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
        reading = asyncio.create_task(self._wait_until_ready(child, ready_read))
        try:
            return await process.wait()
        finally:
            reading.cancel()
            child.process = None

    async def _wait_until_ready(self, child: Child, ready_read: int) -> None:
        reader = asyncio.StreamReader()
        pipe = os.fdopen(ready_read, "rb")
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            async with asyncio.timeout(START_SECONDS):
                if not await reader.read(1):
                    return  # the process has ended
        except TimeoutError:
            log.error("the process %s is not ready after %.0f s and is killed", child.name, START_SECONDS)
            self._signal(child, signal.SIGKILL)
            return
        finally:
            transport.close()
        child.ready.set()
        log.info("the process %s is ready", child.name)
        if child.role.kind == "front" and not self._announced:
            self._announced = True
            self._on_ready(url_of(self._listeners, self._settings.server), self._model_name)

    def _options(self, child: Child) -> list[str]:
        role, options = child.role, {}
        if role.threads is not None:
            options["engine.threads"] = str(role.threads)
        if role.device:
            options["model.device"] = role.device.partition(":")[0]
        if role.kind == "engine" and (trace := self._settings.scheduler.trace_file) is not None:
            options["scheduler.trace_file"] = f"{trace}.{child.name}"
        return [part for option, value in options.items() for part in ("--set", f"{option}={value}")]

    async def _run_command(self, command: str) -> None:
        """Runs a command of the control socket. Raises ConfigError where it is unknown or fails."""
        if command != "reload":
            raise ConfigError(f"unknown command {command!r}")
        await self._reloaded()

    def _reload_soon(self) -> None:
        async def reload() -> None:
            try:
                await self._reloaded()
            except ConfigError as error:
                log.error("%s", error)

        self._hangup = asyncio.create_task(reload())

    async def _reloaded(self) -> None:
        """Replaces the engines. Raises ConfigError where one does not start, or they are being replaced already."""
        if self._reloading is not None and not self._reloading.done():
            raise ConfigError("the engines are being replaced already")
        self._reloading = asyncio.create_task(self._reload())
        await asyncio.shield(self._reloading)

    async def _reload(self) -> None:
        """Replaces the engines one after the other, until a new one does not get ready."""
        self._generation += 1
        for old in [child for child in self._children if child.role.kind == "engine"]:
            new = self._add(old.role)
            ready = asyncio.create_task(new.ready.wait())
            assert new.watching is not None
            await asyncio.wait((ready, new.watching), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not new.ready.is_set():
                ready.cancel()
                await self._stop_for_good(new)
                raise ConfigError(f"the new engine {new.name} does not get ready: {old.name} stays")
            await asyncio.sleep(SETTLE_SECONDS)
            await self._stop_for_good(old)
        log.info("all engines have been replaced")

    async def _stop_for_good(self, child: Child) -> None:
        """Ends a child after its drain, and does not restart it."""
        child.wanted = False
        self._signal(child, signal.SIGTERM)
        await self._wait_for([child])
        self._children.remove(child)
        self._folder.forget(child.name)

    async def _end(self) -> None:
        if self._reloading is not None:
            self._reloading.cancel()
        for kind in ("front", "engine"):
            children = [child for child in self._children if child.role.kind == kind]
            for child in children:
                self._signal(child, signal.SIGTERM)
            await self._wait_for(children)

    async def _wait_for(self, children: Sequence[Child]) -> None:
        """Waits until the children have ended; kills those that do not end in time."""
        tasks = [child.watching for child in children if child.watching is not None]
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=self._settings.server.drain_seconds + GRACE_SECONDS)
        for child in children:
            if child.watching in left:
                log.error("the process %s does not end and is killed", child.name)
                self._signal(child, signal.SIGKILL)
        if left:
            await asyncio.wait(left)

    def _kill(self) -> None:
        for child in self._children:
            self._signal(child, signal.SIGKILL)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    @staticmethod
    def _signal(child: Child, number: signal.Signals) -> None:
        if child.process is not None and child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(number)


def is_wanted(settings: Settings) -> bool:
    """Returns whether the settings need more than one process."""
    engine = settings.engine
    return settings.server.workers > 1 or engine.replicas is not None or bool(engine.devices)


def check(settings: Settings) -> None:
    """Checks that options fit several processes. Raises ConfigError where they do not."""
    engine, rates = settings.engine, settings.rate_limiting
    if engine.replicas is not None and engine.devices and engine.replicas != len(engine.devices):
        text = f"{engine.replicas}, but engine.devices has {len(engine.devices)}: leave one of them out"
        raise ConfigError(f"engine.replicas: {text}")
    if settings.server.workers > 1 and rates.enabled and rates.storage == "memory":
        text = "each of several processes (server.workers) would count for itself in memory; set it to a redis:// URL"
        raise ConfigError(f"rate_limiting.storage: {text}")


def engine_roles(settings: Settings) -> list[Role]:
    """Returns the roles of the engine processes. Where `engine.threads` is not set, they share the cores equally."""
    chosen = settings.engine
    devices = chosen.devices or [""] * (chosen.replicas or 1)
    threads = None if chosen.threads is not None else max(1, usable_cores() // len(devices))
    return [Role("engine", number, device, threads) for number, device in enumerate(devices)]


def front_roles(settings: Settings) -> list[Role]:
    """Returns the roles of the front-end processes."""
    return [Role("front", number) for number in range(settings.server.workers)]


def environment(role: Role) -> Mapping[str, str]:
    """Returns the environment of a child. A GPU that is named by its number is the only one that its engine sees."""
    kind, _, number = role.device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        return {**os.environ}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    known = [each.strip() for each in visible.split(",")] if visible else []
    at = int(number)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": known[at] if at < len(known) else number}
