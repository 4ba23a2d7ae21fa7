"""Programs of this project in processes of their own, without the seconds that their imports take.

One process imports the whole package and forks for each program that a test starts. A program begins with the modules
in memory, and nothing else differs from `python -m bdh_batch`: arguments, environment, streams, signals and the way it
ends are its own. The launcher computes nothing and starts no thread, so there is nothing that a fork could break.

Where a program is a supervisor, the processes that it starts may be forked, too: from a launcher of its own, which is
forked before the program begins. In all else they are what it starts, but not its children.

A program may end briefly: its threads, its exit handlers and its streams end as ever, but its memory is not taken apart
before the process ends. The system would first have to copy that page by page, which takes longer than most commands.

Linux and macOS only; `python -m tests.launcher DESCRIPTOR` is the launcher's own program.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
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
MOST_DESCRIPTORS = 16  # that a program is given
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
        forks: bool = False,
    ) -> Process:
        """`python -m module` with `arguments`, in the root of the checkout, without an input.

        Args:
            brief_end: whether its memory is left to the system when it ends.
            forks: whether processes that it starts are forked, too.
        """
        program = Program(module, [str(each) for each in arguments], dict(env), brief_end, forks)
        return Launched(*order(self._control, program, [stdout.fileno(), (stderr or stdout).fileno()]))

    def close(self) -> None:
        self._control.close()
        self._process.wait()


@dataclass(frozen=True)
class Program:
    """What is run, and how: see `Launcher.start`.

    Args:
        passed: descriptors beside the standard streams, which keep their numbers.
        name: that the system shows of its process; else it shows the launcher's.
    """

    module: str
    arguments: list[str]
    env: dict[str, str]
    brief_end: bool
    forks: bool = False
    passed: Sequence[int] = ()
    name: str = ""


def order(control: socket.socket, program: Program, descriptors: Sequence[int]) -> tuple[int, socket.socket]:
    """Has the launcher at `control` start a program. Returns its process, and what says how that ends.

    Args:
        descriptors: its standard output and errors, and those that are passed.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(control, [b"+"], [theirs.fileno(), *descriptors])
    ours.sendall(json.dumps(asdict(program)).encode() + b"\n")
    return number_from(ours), ours


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
        asked, descriptors, _, _ = socket.recv_fds(control, 1, MOST_DESCRIPTORS)
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
    signal.set_wakeup_fd(-1)  # nobody listens any more
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
    given = dict(zip([1, 2, *program.passed], streams, strict=True))
    free = max([*given, *streams]) + 1  # from here on, no number is one of those that they are to have
    high = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD, free) for number, descriptor in given.items()}
    for descriptor in streams:
        os.close(descriptor)
    for number, descriptor in high.items():
        os.dup2(descriptor, number)
        os.close(descriptor)
    if program.name:
        os.setsid()
        if sys.platform == "linux":
            Path("/proc/self/comm").write_text(program.name)
    os.environ.clear()
    os.environ.update(program.env)
    sys.argv = [program.module, *program.arguments]


class Forked:
    """A process that a supervisor has started: what it uses of `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self._process = Launched(pid, channel)
        self._ended = asyncio.Event()
        self._loop, self._descriptor = asyncio.get_running_loop(), channel.fileno()
        self._loop.add_reader(self._descriptor, self._end)
        self.pid = pid

    def _end(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._process.poll()
        self._ended.set()

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        await self._ended.wait()
        return self._process.wait()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)


def fork_what_it_starts(program: Program) -> Program | None:
    """Forks a launcher for the processes that `program` starts.

    Gives each process what it is: the program itself, one that it starts, or None, at the end of that launcher.
    """
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        return launch(theirs)
    theirs.close()

    async def start(*command: str, pass_fds: Sequence[int], env: Mapping[str, str], start_new_session: bool) -> Forked:
        python, option, module, *arguments = command
        assert (python, option, start_new_session) == (sys.executable, "-m", True)
        name = arguments[arguments.index("--process") + 1].partition(":")[0]
        child = Program(module, arguments, dict(env), program.brief_end, False, [*pass_fds], name)
        return Forked(*order(ours, child, [1, 2, *pass_fds]))

    asyncio.create_subprocess_exec = start  # type: ignore[assignment]
    return program


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
    program = launch(control)
    if program is not None and program.forks:
        program = fork_what_it_starts(program)
    if program is not None:
        run(program)


if __name__ == "__main__":
    main()
