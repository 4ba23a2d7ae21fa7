"""The socket at which a supervisor takes commands: from its front ends, and from `bdh-batch reload` by its pid file.

Commands and responses are lines of JSON. A command is [number, name, argument], its response
{"number": ..., "error": ...}; what the supervisor says of its own accord has no number.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from platformdirs import user_runtime_path

from bdh_batch.errors import BDHError, ConfigError, InvalidRequest, ModelInUse, RetryLater, Unavailable

Message = Mapping[str, Any]
LONGEST = 65536  # bytes of a line


class Connection:
    """One client of the socket, on the supervisor's side. Can be a key of sets: each is itself."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def send(self, **message: object) -> None:
        """Sends a message; it is lost where the client has gone."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def give_back(self, model: int) -> None:
        self.send(give_back=model)


RunCommand = Callable[[Connection, str, Any], Awaitable[None]]  # raises BDHError where it cannot be done


async def listen_for_commands(
    path: Path,
    run: RunCommand,
    joined: Callable[[Connection], None] = lambda connection: None,
    left: Callable[[Connection], None] = lambda connection: None,
) -> asyncio.AbstractServer:
    """Listens at `path` for commands; those of one connection run side by side.

    Args:
        joined, left: are called when a client has connected and disconnected.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, tasks = Connection(writer), set()
        joined(connection)
        try:
            while line := await reader.readline():
                task = asyncio.create_task(_run(run, connection, line))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (OSError, ValueError):  # the client was killed, or has sent too long a line
            pass
        finally:
            for task in tasks:
                task.cancel()
            left(connection)
            writer.close()

    return await asyncio.start_unix_server(serve, str(path), limit=LONGEST)


async def _run(run: RunCommand, connection: Connection, line: bytes) -> None:
    number = None
    try:
        number, name, argument = json.loads(line)
        await run(connection, name, argument)
    except (BDHError, ValueError, TypeError, OSError) as error:
        connection.send(number=number, error=_dump(error))
    else:
        connection.send(number=number, error=None)


ERRORS: Mapping[str, type[BDHError]] = {
    kind.__name__: kind for kind in (ConfigError, InvalidRequest, ModelInUse, Unavailable)
}


def _dump(error: Exception) -> list[object]:
    kind = type(error).__name__ if type(error).__name__ in ERRORS else "ConfigError"
    return [kind, str(error), error.retry_after if isinstance(error, RetryLater) else 0]


def error_of(dumped: list[Any]) -> BDHError:
    """Returns the error of a response."""
    kind, text, retry_after = dumped
    if kind == "Unavailable":
        return Unavailable(text, retry_after)
    return InvalidRequest(text, "model") if kind == "InvalidRequest" else ERRORS[kind](text)


def send_command(pid_file: Path, command: str) -> None:
    """Has the supervisor that wrote `pid_file` run `command`, and returns when it is done.

    Raises:
        ConfigError: no such supervisor runs, or it cannot run the command.
    """
    try:
        with _connected(pid_file) as connection:
            connection.sendall(json.dumps([0, command, None]).encode() + b"\n")
            lines = connection.makefile("rb")
            response = next((message for line in lines if "number" in (message := json.loads(line))), None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{pid_file}: no server of several processes runs that wrote it ({error})") from error
    if response is None:
        raise ConfigError(f"{pid_file}: its server has ended meanwhile")
    if response["error"] is not None:
        raise error_of(response["error"])


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
