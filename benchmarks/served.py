"""A real server in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks import ROOT
from benchmarks.client import Client

START_SECONDS = 600.0  # where no cache holds the kernels yet, they are compiled first
STOP_SECONDS = 30.0


class Served(Client):
    """A server that runs, and the ways to speak to it."""

    def __init__(self, port: int, pid: int = 0, process: subprocess.Popen[bytes] | None = None) -> None:
        super().__init__(f"http://127.0.0.1:{port}")
        self.port = port
        self.pid = pid
        self.process = process  # where it was started here


@contextmanager
def served(
    *options: str, module: Sequence[str] = ("bdh_batch", "serve"), log: Path | None = None, root: Path = ROOT
) -> Iterator[Served]:
    """`bdh-batch serve` with `options`, as in "scheduler.max_running=64", until the block's end.

    Args:
        module: what is run instead, and its arguments; it takes the same `--port` and `--set`.
        log: the file that its output goes to; None keeps it only until it has started.
        root: the checkout whose server it is.
    """
    port = free_port()
    program = [*module, "--port", str(port), *(part for option in options for part in ("--set", option))]
    with tempfile.TemporaryFile() if log is None else log.open("w+b") as output:
        process = start(program, root, output)
        try:
            server = Served(port, process.pid, process)
            _wait_until_ready(server, process, output)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            finally:
                process.kill()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(program: Sequence[str], root: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """`python -m` with `program`, a module and its arguments."""
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("BDH_")}
    return subprocess.Popen(
        [sys.executable, "-m", *program],
        cwd=root,
        env={**environment, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def _wait_until_ready(server: Served, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            server.get("/readyz")
            return
        except OSError:  # not there yet, or too busy with its start to respond
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read().decode()}") from None
        time.sleep(0.05)
