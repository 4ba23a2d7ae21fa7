"""Programs of this project in processes of their own, without the seconds that their imports take.

One process imports the whole package and forks for each program that a test starts. A program begins with the modules
in memory, and nothing else differs from `python -m bdh_batch`: arguments, environment, streams, signals and the way it
ends are its own. The launcher computes nothing and starts no thread, so there is nothing that a fork could break.

A program may end briefly: its threads, its exit handlers and its streams end as ever, but its memory is not taken apart
before the process ends. The system would first have to copy that page by page, which takes longer than most commands.

Linux and macOS only; `python -m tests.launcher DESCRIPTOR` is the launcher's own program.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

ROOT = Path(__file__).parent.parent
# What only some settings ask for, and imports an optional dependency.
OPTIONAL = (
    "bdh_batch.__main__",
    "bdh_batch.client",
    "bdh_batch.deploy.ray",
    "bdh_batch.deploy.replicas",
    "bdh_batch.deploy.up",
    "bdh_batch.kernels.cuda",
    "bdh_batch.kernels.triton_ops",
    "bdh_batch.llm.harness",
    "bdh_batch.observability.spans",
)


class Process(Protocol):
    """What tests use of a program that runs: a part of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Launcher:
    """Starts programs. It ends at `close`, and whatever still runs with it."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.launcher", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(
        self,
        arguments: Sequence[object],
        env: Mapping[str, str],
        stdout: IO[Any],
        stderr: IO[Any] | None = None,
        module: str = "bdh_batch",
        brief_end: bool = False,
    ) -> Process:
        """`python -m module` with `arguments`, in the root of the checkout, without an input."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno(), stdout.fileno(), (stderr or stdout).fileno()]
            socket.send_fds(self._control, [b"+"], descriptors)
        program = Program(module, [str(each) for each in arguments], dict(env), brief_end)
        ours.sendall(json.dumps(asdict(program)).encode() + b"\n")
        return Launched(number_from(ours), ours)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


def number_from(channel: socket.socket) -> int:
    """The next line, and not a byte more."""
    with channel.makefile("rb", buffering=0) as lines:
        line = lines.readline()
    assert line, "the launcher has ended"
    return int(line)


class Launched:
    """A program that runs, or has ended."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self._channel = channel  # says the exit code, once there is one
        self._code: int | None = None
        self._lock = threading.Lock()

    @property
    def returncode(self) -> int | None:
        """As it was when last looked at."""
        return self._code

    def poll(self) -> int | None:
        with self._lock:
            if self._code is None and select.select([self._channel], [], [], 0)[0]:
                self._code = number_from(self._channel)
                self._channel.close()
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired
        """
        with self._lock:
            channel = [] if self._code is not None else [self._channel.dup()]
        for each in channel:  # outside of the lock: others may look meanwhile
            with each:
                select.select([each], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@dataclass(frozen=True)
class Program:
    """What is run, and whether it ends briefly."""

    module: str
    arguments: list[str]
    env: dict[str, str]
    brief_end: bool


def launch(control: socket.socket) -> Program | None:
    """Forks programs until nobody is at the other end of `control`. Gives a program what it is, the launcher None."""
    woken, wakes = socket.socketpair()
    for each in (woken, wakes):
        each.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: it ends with the tests
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    running: dict[int, socket.socket] = {}
    while True:
        ready = select.select([control, woken], [], [])[0]
        if woken in ready:
            woken.recv(4096)
            report_ends(running)
        if control not in ready:
            continue
        asked, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        if not asked:
            break
        channel = socket.socket(fileno=descriptors[0])
        with channel.makefile("rb") as lines:
            program = Program(**json.loads(lines.readline()))
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            for each in (control, woken, wakes, channel, *running.values()):
                each.close()
            become(program, descriptors[1:])
            return program
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        channel.sendall(b"%d\n" % pid)
        running[pid] = channel
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return None


def report_ends(running: dict[int, socket.socket]) -> None:
    for pid, channel in list(running.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            del running[pid]
            with channel, contextlib.suppress(OSError):  # nobody need wait for it
                channel.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def become(program: Program, streams: Sequence[int]) -> None:
    """Makes this process what a fresh one would be."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(streams, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(program.env)
    sys.argv = [program.module, *program.arguments]


def run(program: Program) -> None:
    try:
        runpy.run_module(program.module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if program.brief_end and isinstance(ended.code, int):
            end(ended.code)
        raise


def end(code: int) -> NoReturn:
    """Ends this process as `sys.exit` does, but for what nobody outside of it sees."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for all threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def import_all() -> None:
    """Imports what the commands import sooner or later: most of it only in the function that needs it."""
    importlib.import_module("uvloop")
    target = importlib.import_module("numba.core.registry").cpu_target
    for context in (target.typing_context, target.target_context):
        context.refresh()  # imports what Numba knows of types and functions, which the first kernel would wait for
    for file in sorted((ROOT / "bdh_batch").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if not name.startswith(OPTIONAL):
            importlib.import_module(name.removesuffix(".__init__"))


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # pages that a collection need not touch stay shared
    if (program := launch(control)) is not None:
        run(program)


if __name__ == "__main__":
    main()
