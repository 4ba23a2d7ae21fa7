"""How a supervisor is asked to do something: at a socket in its folder, which its pid file names."""

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

Do = Callable[[str], Awaitable[None]]  # raises BDHError where it cannot be done
LONGEST = 4096  # bytes of a command


async def listen_for_commands(path: Path, do: Do) -> asyncio.AbstractServer:
    """Listens at `path` for commands, each a line; the response is a line of JSON, once it is done."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error = None
        try:
            await do((await reader.readline()).decode().strip())
        except (BDHError, ValueError) as problem:
            error = str(problem)
        with contextlib.suppress(OSError):
            writer.write(json.dumps({"error": error}).encode() + b"\n")
            await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(serve, str(path), limit=LONGEST)


def ask(pid_file: Path, command: str) -> None:
    """Has the supervisor that wrote `pid_file` do `command`; returns when it is done.

    Raises:
        ConfigError: it does not run, or cannot do it.
    """
    try:
        pid, folder = pid_file.read_text(encoding="utf-8").splitlines()[:2]
        os.kill(int(pid), 0)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{pid_file}: no server of several processes runs that wrote it ({error})") from error
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(Path(folder) / "control"))
            connection.sendall(command.encode() + b"\n")
            response = connection.makefile("rb").readline()
        except OSError as error:
            raise ConfigError(f"{pid_file}: its server cannot be asked ({error})") from error
    if not response:
        raise ConfigError(f"{pid_file}: its server has ended meanwhile")
    if (problem := json.loads(response)["error"]) is not None:
        raise ConfigError(problem)


def default_pid_file(port: int, uds: Path | None) -> Path:
    """Where a server that listens there writes its pid file if the settings do not say it."""
    name = str(port) if uds is None else hashlib.sha256(bytes(uds.absolute())).hexdigest()[:16]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the system has no such folder, and then has another one
        return user_runtime_path("bdh-batch", appauthor=False) / f"{name}.pid"


class PidFile:
    """Says which supervisor runs, and where it can be asked.

    Raises:
        ConfigError: another one that runs has written it, or it cannot be written.
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


def _running(path: Path) -> int | None:
    """The process that wrote the pid file at `path`, if it still runs."""
    try:
        pid = int(path.read_text(encoding="utf-8").splitlines()[0])
        os.kill(pid, 0)
    except (OSError, ValueError, IndexError):
        return None
    return pid
