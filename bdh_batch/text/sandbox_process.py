"""The part of the sandbox that runs in its own process: a warm process that forks workers, which do the jobs.

The warm process prepares once what all jobs need, runs no job itself, and so can replace a worker in milliseconds. A
worker's limits are the kernel's: memory, stack, processor time and time ends it, whatever it is doing, and how it ended
shows which it was. What is not covered: workers run as the server's user, without the server's settings.

Knows nothing of what jobs are: a module does, that has `prepare(setup)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import NoReturn

NICE = 5  # jobs give way to the engine
RETAINED_MEMORY = 64 * 2**20  # bytes; a worker that has grown by more is replaced
JOB, CANCEL = b"J", b"C"  # frames to the warm process; the number of the job follows
NUMBER = 8  # bytes of that
STAYING, LEAVING = b"+", b"-"  # first bytes of frames from a worker: whether it takes another job
PDEATHSIG = 1

# First bytes of frames from it; the number of the job follows, and then what it made, or what was wrong.
READY, DONE, REFUSED, TIMEOUT, MEMORY, CRASH, CANCELLED = b"R", b"D", b"F", b"T", b"M", b"X", b"C"
OUTCOMES = {
    DONE: "ok",
    REFUSED: "refused",
    TIMEOUT: "timeout",
    MEMORY: "memory",
    CRASH: "crash",
    CANCELLED: "cancelled",
}
SIGNALS = {
    signal.SIGPROF: TIMEOUT,
    signal.SIGALRM: TIMEOUT,
    signal.SIGABRT: MEMORY,  # how native code ends that is given none
    signal.SIGKILL: MEMORY,  # sent by the kernel, which was short of it
}


class Refused(Exception):
    """The job cannot be done; what it says is for the client that asked."""


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What one job may take.

    Args:
        seconds: of processor time.
        patience: times as long by the clock, as the machine may be busy.
        memory: bytes beside those of the warm process.
        trusted_setup: whether the preparation may take more than that.
        stack: bytes.
        jobs: that one worker does, one after the other.
    """

    seconds: float
    memory: int
    trusted_setup: bool = False
    stack: int = 8 * 2**20
    jobs: int = 1
    patience: float = 6.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """The function that does the jobs, and what the preparation reports to the server."""

    work: Callable[[bytes], bytes]
    ready: bytes = b""


@dataclass(eq=False)
class _Worker:
    pid: int
    pipe: Connection
    number: bytes = b""  # of its job; empty where it has none
    job: bytes = field(default=b"", repr=False)
    cancelled: bool = False
    again: bool = True  # whether its job is done again by another one if somebody kills this one


class WarmProcess:
    """Forks workers, gives them jobs, and replaces those that end."""

    def __init__(self, server: Connection, work: Callable[[bytes], bytes], limits: JobLimits) -> None:
        self._server = server
        self._work = work
        self._limits = limits
        self._workers: list[_Worker] = []

    def run(self) -> None:
        """Until the server closes its end."""
        while True:
            ready = wait([self._server, *(worker.pipe for worker in self._workers)])
            for worker in [worker for worker in self._workers if worker.pipe in ready]:
                self._hear(worker)
            if self._server in ready:
                try:
                    frame = self._server.recv_bytes()
                except (EOFError, OSError):
                    break
                self._obey(frame[:1], frame[1 : 1 + NUMBER], frame)
        for worker in self._workers:
            os.kill(worker.pid, signal.SIGKILL)

    def _obey(self, kind: bytes, number: bytes, frame: bytes) -> None:
        if kind == JOB:
            self._give(number, frame[1 + NUMBER :])
            return
        for worker in self._workers:
            if worker.number == number:
                worker.cancelled = True
                os.kill(worker.pid, signal.SIGKILL)

    def _give(self, number: bytes, job: bytes, again: bool = True) -> None:
        """To a worker that waits, or to a new one."""
        for worker in [worker for worker in self._workers if not worker.number]:
            if self._send(worker, number, job, again):
                return
            self._bury(worker)
        self._send(self._fork(), number, job, again)

    @staticmethod
    def _send(worker: _Worker, number: bytes, job: bytes, again: bool) -> bool:
        worker.number, worker.job, worker.again = number, job, again
        try:
            worker.pipe.send_bytes(job)
        except OSError:  # it has ended; if it is new, its end shows how
            return False
        return True

    def _hear(self, worker: _Worker) -> None:
        """What a worker says, or that it has ended."""
        try:
            said = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._ended(worker)
            return
        number, worker.number, worker.job = worker.number, b"", b""
        if said[:1] == LEAVING:
            self._bury(worker)
        self._report(said[1:2], number, said[2:])

    def _ended(self, worker: _Worker) -> None:
        code = self._bury(worker)
        if not worker.number:
            return
        if code == -signal.SIGKILL and worker.again and not worker.cancelled:
            self._give(worker.number, worker.job, again=False)
            return
        outcome = CANCELLED if worker.cancelled else SIGNALS.get(signal.Signals(-code), CRASH) if code < 0 else CRASH
        text = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._report(outcome, worker.number, text.encode())

    def _bury(self, worker: _Worker) -> int:
        """Its exit code; negative is a signal."""
        self._workers.remove(worker)
        worker.pipe.close()
        _, status = os.waitpid(worker.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _report(self, outcome: bytes, number: bytes, payload: bytes) -> None:
        with contextlib.suppress(OSError):  # the server has gone; the next look at its end shows it
            self._server.send_bytes(outcome + number + payload)

    def _fork(self) -> _Worker:
        ours, theirs = Pipe()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            self._be_worker(parent, ours, theirs)
        theirs.close()
        worker = _Worker(pid, ours)
        self._workers.append(worker)
        return worker

    def _be_worker(self, parent: int, ours: Connection, theirs: Connection) -> NoReturn:
        try:
            for connection in (ours, self._server, *(worker.pipe for worker in self._workers)):
                connection.close()
            end_with_parent(parent)
            confine(self._limits)
            work_through(theirs, self._work, self._limits)
        finally:
            os._exit(1)


def end_with_parent(parent: int) -> None:
    """Also in the midst of a job, and however the process `parent` ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before, of which there is no notice; a job may wait in the pipe
            os._exit(1)


def confine(limits: JobLimits) -> None:
    """What holds for all jobs of this process, by the kernel."""
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hardest = resource.getrlimit(resource.RLIMIT_STACK)
    stack = limits.stack if hardest == resource.RLIM_INFINITY else min(limits.stack, hardest)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hardest))
    bound_memory(limits.memory)
    nowhere = os.open(
        os.devnull, os.O_WRONLY
    )  # native code that ends a process says so there, which is reported anyway
    os.dup2(nowhere, 2)


def bound_memory(more: int) -> None:
    """This process may have so many bytes more than it has, or what it was given, if that is less."""
    space, _ = memory_in_use()
    if space:  # elsewhere this limit does not hold, or what it is beside is not known
        _, hardest = resource.getrlimit(resource.RLIMIT_AS)
        most = space + more
        most = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
        resource.setrlimit(resource.RLIMIT_AS, (most, hardest))


def memory_in_use() -> tuple[int, int]:
    """Bytes of address space, and of memory behind it; zeros where the system does not report."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            space, resident = file.read().split()[:2]
    except OSError:
        return 0, 0
    page = resource.getpagesize()
    return int(space) * page, int(resident) * page


def work_through(pipe: Connection, work: Callable[[bytes], bytes], limits: JobLimits) -> None:
    """Does the jobs that come, until this process should be replaced."""
    began = memory_in_use()[1]
    for left in reversed(range(limits.jobs)):
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)
        signal.setitimer(signal.ITIMER_REAL, limits.seconds * limits.patience)
        said = attempt(work, job)
        leaving = not left or memory_in_use()[1] - began > RETAINED_MEMORY
        pipe.send_bytes((LEAVING if leaving else STAYING) + said)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del job, said
        if leaving:
            return


def attempt(work: Callable[[bytes], bytes], job: bytes) -> bytes:
    """The frame that reports the result of a job."""
    try:
        return DONE + work(job)
    except Refused as refused:
        return REFUSED + str(refused).encode(errors="replace")
    except MemoryError:
        return MEMORY
    except Exception:  # noqa: BLE001 - a bug of ours; the server writes it into its log
        return CRASH + traceback.format_exc().encode(errors="replace")


def main(file: int) -> None:
    """Serves the server at the other end of the socket `file`."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a service manager may send them to all processes of the server
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):  # the server has ended, which it may at any time
        serve(Connection(file))


def serve(server: Connection) -> None:
    """Prepares, says so, and runs jobs until the server ends."""
    order = json.loads(server.recv_bytes())
    limits, setup = JobLimits(**order["limits"]), server.recv_bytes()
    if not limits.trusted_setup:
        bound_memory(limits.memory)
    try:
        prepared = importlib.import_module(order["module"]).prepare(setup)
    except Refused as refused:
        server.send_bytes(REFUSED + str(refused).encode(errors="replace"))
        return
    except MemoryError:
        server.send_bytes(MEMORY)
        return
    del setup
    gc.collect()
    gc.freeze()  # what is shared with workers stays shared
    server.send_bytes(READY + prepared.ready)
    WarmProcess(server, prepared.work, limits).run()
