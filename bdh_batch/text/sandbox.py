"""Jobs that cannot harm the server, whatever they do: chat templates, and grammars before the server compiles them.

They run in processes of their own with bounds of memory, stack and time (`sandbox_process.py`), behind a bounded queue
that is fair to tenants (`turns.py`). A job that exceeds its bounds, or whose client has left, is killed; that costs the
next one nothing. The processes end with the server, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

from bdh_batch.errors import Unavailable
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text.job_queue import JobQueue, QueueLimits
from bdh_batch.text.sandbox_process import (
    CANCEL,
    CANCELLED,
    CRASH,
    DONE,
    JOB,
    MEMORY,
    NUMBER,
    OUTCOMES,
    READY,
    REFUSED,
    TIMEOUT,
    JobLimits,
    Refused,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

START_SECONDS = 60.0  # for Python's start, and to prepare for jobs
GRACE_SECONDS = 0.2  # a job that ends so soon after its client has left need not be killed
LENGTH = struct.Struct("!i")  # before each frame, as multiprocessing's connections have it
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from bdh_batch.text.sandbox_process import main; main(int(sys.argv[1]))"
)


class JobFailed(Exception):
    """A job that had to be killed, or died: `outcome` is timeout, memory or crash, and it says which bound was hit."""

    def __init__(self, outcome: str, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


class _Lost(Exception):
    """The warm process is gone."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a sandbox does: a module that has `prepare(setup)`, and how far its jobs may go.

    Args:
        seconds_option, memory_option: the settings that say so, for errors.
    """

    module: str
    setup: bytes
    limits: JobLimits
    seconds_option: str
    memory_option: str


class Runs(Protocol):
    """The part of a `Sandbox` that runs jobs."""

    async def run(self, job: bytes, tenant: str, then: Callable[[bytes], Awaitable[T]]) -> T: ...


@dataclass(frozen=True, slots=True)
class SandboxLoad:
    """The load of a sandbox, and counts of how its jobs ended."""

    waiting: int
    running: int
    outcomes: Mapping[str, int]


class Sandbox:
    """Starts its process at once; `wait_until_ready` says what came of it. All else is for the event loop."""

    def __init__(self, work: Work, queue: QueueLimits | None = None) -> None:
        self._work = work
        self._queue = JobQueue(queue or QueueLimits())
        self._counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES.values(), 0))
        self._numbers = count(1)
        self._process: _Process | None = _Process(work)
        self._link: _Link | None = None
        self._linking: asyncio.Task[_Link] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that these belong to
        self._closed = False

    def wait_until_ready(self) -> bytes:
        """Blocks until the process is prepared, and returns what it reports.

        Raises:
            Refused: it cannot be, which is the setup's fault.
        """
        assert self._process is not None
        return self._process.wait_until_ready()

    def warm_up(self, job: bytes | None = None) -> None:
        """Has the process ready for the first job, without waiting for it.

        Args:
            job: is run, so that a worker has done once what each does once. What comes of it is nobody's.
        """
        self._linking = self._begin(job)
        self._linking.add_done_callback(lambda done: done.cancelled() or done.exception())  # the next job tries again

    async def run(self, job: bytes, tenant: str, then: Callable[[bytes], Awaitable[T]]) -> T:
        """What `then` makes of the job's result, in the same turn.

        A cancelled call takes its job with it.

        Raises:
            Refused: the job says so.
            JobFailed: it exceeded its bounds.
            QueueFull, Unavailable: not now.
        """
        await self._queue.take(tenant, len(job))
        doing = asyncio.ensure_future(self._do(job, then))
        doing.add_done_callback(lambda _: self._queue.give_back(tenant))
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            doing.add_done_callback(lambda done: done.cancelled() or done.exception())  # no other task reads it
            asyncio.get_running_loop().call_later(GRACE_SECONDS, doing.cancel)
            raise

    @property
    def load(self) -> SandboxLoad:
        return SandboxLoad(self._queue.waiting, self._queue.running, dict(self._counts))

    def close(self) -> None:
        """Kills what runs. Idempotent. It blocks for a moment, so it may be called from any thread."""
        self._closed = True
        if self._loop is not None and asyncio._get_running_loop() is not self._loop:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and its tasks with it
                self._loop.call_soon_threadsafe(self._unlink)
        else:
            self._unlink()
        if self._process is not None:
            self._process.close()

    def _unlink(self) -> None:
        if self._linking is not None:
            self._linking.cancel()
        if self._link is not None:
            self._link.close()

    async def _do(self, job: bytes, then: Callable[[bytes], Awaitable[T]]) -> T:
        outcome, said = await self._outcome(job)
        self._counts[OUTCOMES[outcome]] += 1
        if outcome == DONE:
            return await then(said)
        if outcome == REFUSED:
            raise Refused(said.decode())
        if outcome == CANCELLED:
            raise asyncio.CancelledError
        if outcome == CRASH:
            ours = said.startswith(b"Traceback")  # else native code crashed on what a client sent
            text = "a job of %s crashed: %s"
            log.log(logging.ERROR if ours else logging.INFO, text, self._work.module, said.decode(errors="replace"))
        raise JobFailed(OUTCOMES[outcome], self._bound(outcome))

    async def _outcome(self, job: bytes) -> tuple[bytes, bytes]:
        """Twice, where the warm process has been killed meanwhile."""
        number = next(self._numbers).to_bytes(NUMBER)
        for _ in range(2):
            link = await self._linked()
            with contextlib.suppress(_Lost):
                return await link.do(number, job)
        return CRASH, b"the sandbox's process was killed"

    def _bound(self, outcome: bytes) -> str:
        limits = self._work.limits
        if outcome == TIMEOUT:
            return f"it takes more than {limits.seconds:g} s ({self._work.seconds_option})"
        if outcome == MEMORY:
            return f"it takes more than {limits.memory / 2**20:g} MiB ({self._work.memory_option})"
        return "its process crashed on it"

    async def _linked(self) -> _Link:
        if self._link is not None and not self._link.lost:
            return self._link
        if self._closed:
            raise Unavailable("The server is shutting down.", retry_after=5)
        if self._linking is None or self._linking.done():
            self._linking = self._begin(None)
        return await asyncio.shield(self._linking)

    def _begin(self, job: bytes | None) -> asyncio.Task[_Link]:
        self._loop = asyncio.get_running_loop()
        return self._loop.create_task(self._connect(job))

    async def _connect(self, job: bytes | None) -> _Link:
        """To the process that was started first, or else to a new one."""
        process = await in_daemon_thread(self._ready_process, "bdh-sandbox")
        reader, writer = await asyncio.open_unix_connection(sock=process.take_socket())
        self._link = link = _Link(reader, writer, self._on_lost)
        if job is not None:
            with contextlib.suppress(_Lost):
                await link.do(next(self._numbers).to_bytes(NUMBER), job)
        return link

    def _ready_process(self) -> _Process:
        process = self._process = self._process or _Process(self._work)
        try:
            process.wait_until_ready()
        except Refused as error:
            self._process = None
            if not self._closed:
                log.error("the sandbox of %s cannot be started: %s", self._work.module, error)
            raise Unavailable("The sandbox cannot be started.", retry_after=5) from error
        if self._closed:
            process.close()
        return process

    def _on_lost(self) -> None:
        """The next job finds a new process ready, or on its way."""
        if self._closed:
            return
        log.warning("the process of %s ended; another one is started", self._work.module)
        process, self._process = self._process, None
        if process is not None:
            process.close()
        self.warm_up()


class _Process:
    """A warm process, and this end of the socket to it."""

    def __init__(self, work: Work) -> None:
        self._socket, theirs = socket.socketpair()
        self._taken = False
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, str(theirs.fileno()), json.dumps(import_path())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the server's affair
            )
        self._work = work
        self._ready: bytes | None = None

    def wait_until_ready(self) -> bytes:
        """Blocks; see `Sandbox`."""
        if self._ready is None:
            self._ready = self._prepared()
        return self._ready

    def _prepared(self) -> bytes:
        order = {"module": self._work.module, "limits": asdict(self._work.limits)}
        connection = Connection(os.dup(self._socket.fileno()))
        try:
            for frame in (json.dumps(order).encode(), self._work.setup):
                connection.send_bytes(frame)
            said = connection.recv_bytes() if connection.poll(START_SECONDS) else TIMEOUT
        except (EOFError, OSError):
            said = CRASH
        finally:
            connection.close()
        if said[:1] == READY:
            return said[1:]
        self.close()
        reasons = {MEMORY: "it needs too much memory", TIMEOUT: f"it takes more than {START_SECONDS:g} s"}
        raise Refused(said[1:].decode() or reasons.get(said[:1], "its process ended at its start"))

    def take_socket(self) -> socket.socket:
        """The caller has to close it."""
        self._taken = True
        return self._socket

    def close(self) -> None:
        """Its workers end with it. Idempotent."""
        self._popen.kill()
        self._popen.wait()
        if not self._taken:
            self._socket.close()


class _Link:
    """The event loop's end of the socket to a warm process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_lost: Callable[[], None]) -> None:
        self._reader = reader
        self._writer = writer
        self._on_lost = on_lost
        self._waiting: dict[bytes, asyncio.Future[tuple[bytes, bytes]]] = {}
        self.lost = False
        self._listening = asyncio.ensure_future(self._listen())

    async def do(self, number: bytes, job: bytes) -> tuple[bytes, bytes]:
        """The outcome of a job, and what was said of it. Cancelled, it has the job killed, and waits for its end.

        Raises:
            _Lost
        """
        if self.lost:
            raise _Lost
        completed = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(JOB + number, job)
        try:
            return await asyncio.shield(completed)
        except asyncio.CancelledError:
            if not completed.done():
                self._send(CANCEL + number)
                await asyncio.wait([completed])
            if completed.exception() is None:
                outcome, said = completed.result()
                return outcome, said
            raise

    def close(self) -> None:
        self._listening.cancel()
        self._writer.close()
        self._lose()

    def _send(self, *pieces: bytes) -> None:
        self._writer.write(LENGTH.pack(sum(map(len, pieces))))
        for piece in pieces:
            self._writer.write(piece)

    async def _listen(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                frame = await self._reader.readexactly(length)
                waiting = self._waiting.pop(frame[1 : 1 + NUMBER], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result((frame[:1], frame[1 + NUMBER :]))
        self._writer.close()
        self._lose()
        self._on_lost()

    def _lose(self) -> None:
        self.lost = True
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            if not each.done():
                each.set_exception(_Lost())


def import_path() -> list[str]:
    """Where this program finds its modules, which need not be where a new one would look."""
    return [os.path.abspath(entry) for entry in sys.path]


def environment() -> dict[str, str]:
    """The server's, without its settings, some of which are secret."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("BDH_")}
    return kept | {"TOKENIZERS_PARALLELISM": "false"}
