"""Sends commands to a supervisor, at a socket in the runtime folder that its pid file names."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path

from platformdirs import user_runtime_path

from bdh_batch.errors import BDHError, ConfigError

RunCommand = Callable[[str], Awaitable[None]]  # raises BDHError where it cannot be done
LONGEST = 4096  # bytes of a command


async def listen_for_commands(path: Path, run: RunCommand) -> asyncio.AbstractServer:
    """Listens at `path` for commands, one a line; responds with a line of JSON when a command is done."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error = None
        try:
            await run((await reader.readline()).decode().strip())
        except (BDHError, ValueError, OSError) as problem:
            error = str(problem)
        with contextlib.suppress(OSError):
            writer.write(json.dumps({"error": error}).encode() + b"\n")
            await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(serve, str(path), limit=LONGEST)


def send_command(pid_file: Path, command: str) -> None:
    """Has the supervisor that wrote `pid_file` run `command`, and returns when it is done.

    Raises:
        ConfigError: no such supervisor runs, or it cannot run the command.
    """
    try:
        with _connected(pid_file) as connection:
            connection.sendall(command.encode() + b"\n")
            response = connection.makefile("rb").readline()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{pid_file}: no server of several processes runs that wrote it ({error})") from error
    if not response:
        raise ConfigError(f"{pid_file}: its server has ended meanwhile")
    if (problem := json.loads(response)["error"]) is not None:
        raise ConfigError(problem)


def default_pid_file(port: int, uds: Path | None) -> Path:
    """Returns the pid file of a server that listens there, where the settings name none."""
    name = str(port) if uds is None else hashlib.sha256(bytes(uds.absolute())).hexdigest()[:16]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the system has no such folder, and then has another one
        return user_runtime_path("bdh-batch", appauthor=False) / f"{name}.pid"


class PidFile:
    """A file that names a supervisor's process and its runtime folder.

    Raises:
        ConfigError: the file is that of another supervisor that still runs, or cannot be written.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        if (other := _running(path)) is not None:
            raise ConfigError(f"server.pid_file: {path} is that of another server, which runs (process {other})")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{os.getpid()}\n{folder}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"server.pid_file: {path} cannot be written ({error.strerror})") from error

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _running(path: Path) -> str | None:
    """Returns the process id in the pid file at `path`, if the server that wrote it still runs."""
    try:
        _connected(path).close()
        return path.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, ValueError):
        return None


def _connected(pid_file: Path) -> socket.socket:
    """Connects to the supervisor that wrote `pid_file`: process ids alone are used again, and in a container all are 1.

    Raises:
        OSError, ValueError: there is none.
    """
    _, folder = pid_file.read_text(encoding="utf-8").splitlines()[:2]
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(Path(folder) / "control"))
    except OSError:
        connection.close()
        raise
    return connection
