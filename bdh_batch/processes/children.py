"""The child processes of a supervisor: it starts them, restarts those that end, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bdh_batch.processes.folder import RuntimeFolder

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds until a process that could not serve is started again
START_SECONDS = 600.0  # within which a process has to be ready; then it is killed
LOOKS = 6  # without a heartbeat in between, until an engine is taken to hang
GRACE_SECONDS = 10.0  # after the drain, until a process that does not end is killed
SETTLED_SECONDS = 1.0  # in which one that ends at the first thing that it does has ended
REPORT_SECONDS = 1.0  # in which what a process that has ended said of it is read
NOT_STARTED = 127
CANNOT_START = 2  # exit status of a process that logs why


@dataclass(frozen=True, slots=True)
class Role:
    """What a child process does: which kind it is, and with which part of the machine.

    Args:
        kind: "engine" or "front".
        number: among those of its kind.
        model: the number of the model that an engine computes.
        device: that an engine computes on; empty is that of the settings.
        threads: that an engine computes with; None is as the settings say.
    """

    kind: str
    number: int
    model: int = 0
    device: str = ""
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a child says of its start, once: that it is ready, or why it cannot start.

    Args:
        problem: the reason, or None where it is ready.
        for_memory: whether the reason is that memory is lacking.
        unsaid: whether its process ended before it said anything, and may do better the next time.
    """

    problem: str | None
    for_memory: bool = False
    unsaid: bool = False

    def dump(self) -> bytes:
        return json.dumps([self.problem, self.for_memory]).encode()

    @classmethod
    def of(cls, text: bytes) -> Report:
        """Parses what `dump` returned."""
        return cls(*json.loads(text))


class Backoff:
    """How long a process waits that has ended, until it is started again.

    One that has served comes back at once, however often it ends: streams wait for it, and what the restarts cost is
    bounded by the time that each start takes. One that ends before it is ready, or at once after that, serves nobody
    and takes cores from those that do: it waits twice as long each time, until it has served.

    So does systemd, by default: it starts again after 0.1 s, and only gives up after five starts in ten seconds.
    Kubernetes waits for 10 s and more after any end, until a container has run for ten minutes: it cannot know what has
    served, and moves the load elsewhere. vLLM restarts nothing: it ends with its engine.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ready: float | None = None
        self._next = FIRST_WAIT

    def ready(self) -> None:
        """Is called when the process is ready."""
        self._ready = self._clock()

    def ended(self) -> float:
        """Is called when the process has ended. Returns the seconds to wait."""
        since, self._ready = self._ready, None
        if since is not None and self._clock() - since >= SETTLED_SECONDS:
            self._next = FIRST_WAIT
            return 0.0
        wait, self._next = self._next, min(2 * self._next, LONGEST_WAIT)
        return wait


@dataclass(eq=False)
class Child:
    """A child process and its state. Once `unwanted` is set, it is not started again when it ends."""

    role: Role
    name: str
    folder: RuntimeFolder
    cores: tuple[int, ...] = ()  # that it computes on; none is all of them
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    failed: asyncio.Event = field(default_factory=asyncio.Event)  # whether it has ended before it was ready
    report: Report | None = None
    unwanted: asyncio.Event = field(default_factory=asyncio.Event)
    accepts_early: bool = False  # whether a front end accepts connections before it has its models
    backoff: Backoff = field(default_factory=Backoff)
    watching: asyncio.Task[None] | None = None


class Children:
    """The processes of one server.

    Args:
        command: the module that children are started as, and its arguments.
        options: returns what a child is told on its command line, by the options' names.
        listeners: at which front ends serve.
        drain_seconds: that a process has to end.
        hang_seconds: without a heartbeat, after which an engine that was ready is killed and restarted.
        on_change: is called when a child is ready, and when one has ended before it was.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: Callable[[Child], Mapping[str, str]],
        listeners: Sequence[socket.socket],
        drain_seconds: float,
        hang_seconds: float,
        on_change: Callable[[Child], None],
    ) -> None:
        self._command = command
        self._options = options
        self._listeners = listeners
        self._drain_seconds = drain_seconds
        self._hang_seconds = hang_seconds
        self._on_change = on_change
        self._liveness, self._liveness_of_children = socket.socketpair()  # closes when this process ends
        self._all: list[Child] = []

    def of(self, kind: str, model: int | None = None) -> list[Child]:
        """Returns the children of that kind; with `model`, those of one model."""
        return [each for each in self._all if each.role.kind == kind and model in (None, each.role.model)]

    def add(self, role: Role, name: str, folder: RuntimeFolder, cores: tuple[int, ...] = ()) -> Child:
        """Starts a child, which is restarted whenever it ends, until it is stopped."""
        child = Child(role, name, folder, cores)
        self._all.append(child)
        child.watching = asyncio.create_task(self._supervise(child))
        return child

    async def stop(self, children: Sequence[Child]) -> None:
        """Ends children after their drain, and does not restart them."""
        for child in children:
            _terminate(child)
        await self._wait_for(children)
        for child in children:
            self._all.remove(child)
            child.folder.forget(child.name)

    async def end(self) -> None:
        """Ends the front ends first, which drain, then the engines. None is to be added any more."""
        for kind in ("front", "engine"):
            children = self.of(kind)
            for child in children:
                _terminate(child)
            await self._wait_for(children)
        for each in (self._liveness, self._liveness_of_children):
            each.close()

    def kill(self) -> None:
        """Kills all of them at once."""
        for child in self._all:
            child.unwanted.set()
            send_signal(child, signal.SIGKILL)

    async def _supervise(self, child: Child) -> None:
        while not child.unwanted.is_set():
            try:
                status = await self._run(child)
            except OSError as error:  # the system has no process, memory or descriptor left
                log.error("the process %s cannot be started: %s", child.name, error)
                status = NOT_STARTED
            if child.unwanted.is_set():
                return
            how = f"status {status}" if status >= 0 else f"signal {-status}"
            log.error("the process %s ended (%s)", child.name, how)
            if not child.ready.is_set():
                text = f"its process ended ({how}); the log above may say why"
                killed = status == -signal.SIGKILL  # by the system, where it has no memory left
                child.report = child.report or Report(text, for_memory=killed, unsaid=status != CANNOT_START)
                child.failed.set()
                self._on_change(child)
            child.ready.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.unwanted.wait(), child.backoff.ended())

    async def _run(self, child: Child) -> int:
        """Runs the process of `child` and returns its exit status; that of a signal is its number, negative."""
        child.report = None
        report_read, report_write = os.pipe()
        passed = [self._liveness_of_children.fileno(), report_write]
        sockets = [listener.fileno() for listener in self._listeners] if child.role.kind == "front" else []
        cores = ",".join(map(str, child.cores))
        own = [child.name, child.role.model, child.folder.path, child.role.threads or "", cores]
        child.accepts_early = may_accept_early(child, self._all)
        spec = ":".join(map(str, [*own, *passed, int(child.accepts_early), *sockets]))
        options = [part for name, value in self._options(child).items() for part in ("--set", f"{name}={value}")]
        command = [sys.executable, "-m", *self._command, *options, "--process", spec]
        try:
            child.process = process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[*passed, *sockets], env=environment(child.role), start_new_session=True
            )
        except OSError:
            child.accepts_early = False
            os.close(report_read)
            raise
        finally:
            os.close(report_write)
        if child.unwanted.is_set():  # stopped while it was being started
            _terminate(child)
        reading = asyncio.create_task(self._read_report(child, report_read))
        watching = asyncio.create_task(self._kill_when_it_hangs(child))
        try:
            status = await process.wait()
            await asyncio.wait([reading], timeout=REPORT_SECONDS)
            return status
        finally:
            reading.cancel()
            watching.cancel()
            child.process, child.accepts_early = None, False

    async def _read_report(self, child: Child, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        pipe = os.fdopen(descriptor, "rb")
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            async with asyncio.timeout(START_SECONDS):
                text = await reader.read()
        except TimeoutError:
            log.error("the process %s is not ready after %.0f s and is killed", child.name, START_SECONDS)
            send_signal(child, signal.SIGKILL)
            return
        finally:
            transport.close()
        if not text:
            return  # the process has ended
        child.report = Report.of(text)
        if child.report.problem is None:
            child.backoff.ready()
            child.ready.set()
            log.info("the process %s is ready", child.name)
            self._on_change(child)

    async def _kill_when_it_hangs(self, child: Child) -> None:
        """Kills an engine that has no heartbeat any more. A front end has none: what it cannot do, others do.

        Looks are counted, not seconds: where all processes were stopped for a while, as in a container that is paused,
        nobody was late.
        """
        if child.role.kind != "engine":
            return
        await child.ready.wait()
        last, same = child.folder.last_beat(child.name), 0
        while same < LOOKS:
            await asyncio.sleep(self._hang_seconds / LOOKS)
            beat = child.folder.last_beat(child.name)
            last, same = beat, same + 1 if beat == last else 0
        log.error("the process %s hangs: no heartbeat for %.0f s; it is killed", child.name, self._hang_seconds)
        send_signal(child, signal.SIGKILL)

    async def _wait_for(self, children: Sequence[Child]) -> None:
        """Waits until the children have ended; kills those that do not end in time."""
        tasks = [child.watching for child in children if child.watching is not None]
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=self._drain_seconds + GRACE_SECONDS)
        for child in children:
            if child.watching in left:
                log.error("the process %s does not end and is killed", child.name)
                send_signal(child, signal.SIGKILL)
        if left:
            await asyncio.wait(left)


def may_accept_early(child: Child, children: Sequence[Child]) -> bool:
    """Returns whether a front end accepts connections before it has its models. Where another one accepts at the same
    sockets, that one answers probes, and serves whom this one would refuse."""
    fronts = [each for each in children if each.role.kind == "front" and each is not child]
    return child.role.kind == "front" and not any(each.ready.is_set() or each.accepts_early for each in fronts)


def _terminate(child: Child) -> None:
    """Has a child drain and end. An engine that still loads has nothing to drain, and would load to the end first."""
    child.unwanted.set()
    loads = child.role.kind == "engine" and not child.ready.is_set()
    send_signal(child, signal.SIGKILL if loads else signal.SIGTERM)


def send_signal(child: Child, number: int) -> None:
    """Sends a signal to a child's process, where it has one that runs."""
    if child.process is not None and child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def environment(role: Role) -> Mapping[str, str]:
    """Returns the environment of a child. A GPU that is named by its number is the only one that its engine sees."""
    kind, _, number = role.device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        return {**os.environ}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    known = [each.strip() for each in visible.split(",")] if visible else []
    at = int(number)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": known[at] if at < len(known) else number}
