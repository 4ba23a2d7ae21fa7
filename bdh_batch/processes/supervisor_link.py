"""A front end's connection to its supervisor, which says which models are loaded."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from bdh_batch.errors import Unavailable
from bdh_batch.processes.control import LONGEST, error_of
from bdh_batch.processes.loaded_models import State


class SupervisorLink:
    """Sends commands to the supervisor, and hears of models.

    Args:
        on_state: is called with a model's number and its state whenever that has changed.
        on_give_back: is called with the number of a model that has to be released.
    """

    def __init__(self, on_state: Callable[[int, State], None], on_give_back: Callable[[int], None]) -> None:
        self._on_state = on_state
        self._on_give_back = on_give_back
        self._numbers = itertools.count()
        self._responses: dict[int, asyncio.Future[None]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, path: Path) -> None:
        """Connects to the supervisor's socket. Raises OSError."""
        reader, self._writer = await asyncio.open_unix_connection(str(path), limit=LONGEST)
        self._reading = asyncio.create_task(self._read(reader))

    async def run(self, command: str, model: int) -> None:
        """Runs a command for a model, and returns when it is done.

        Raises:
            InvalidRequest, ModelInUse, Unavailable: as the supervisor says.
        """
        number = next(self._numbers)
        response: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._responses[number] = response
        try:
            self._send(number, command, model)
            await response
        finally:
            del self._responses[number]

    def tell(self, command: str, model: int) -> None:
        """Sends a command that cannot fail."""
        self._send(next(self._numbers), command, model)

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()

    def _send(self, *command: object) -> None:
        if self._writer is None or self._writer.is_closing():
            raise Unavailable("The server is shutting down.", retry_after=5)
        self._writer.write(json.dumps(command).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            await self._read_messages(reader)
        finally:
            for response in self._responses.values():
                if not response.done():
                    response.set_exception(Unavailable("The server is shutting down.", retry_after=5))

    async def _read_messages(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "state" in message:
                self._on_state(message["model"], State(message["state"]))
            elif "give_back" in message:
                self._on_give_back(message["give_back"])
            elif (response := self._responses.get(message["number"])) is not None and not response.done():
                error = message["error"]
                response.set_result(None) if error is None else response.set_exception(error_of(error))
