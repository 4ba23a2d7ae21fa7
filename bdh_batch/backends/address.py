"""Where an engine listens for front ends: a socket of this machine, or a port of another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from bdh_batch.backends.recorder import recorded, step_file

Opened = TypeVar("Opened", bound=asyncio.Protocol)


class Address(Protocol):
    """An engine's address. Its text is the engine's name, which no other engine has."""

    async def connect(self, make: Callable[[], Opened]) -> Opened:
        """Connects to the engine. Raises OSError where that is not possible."""

    def in_step(self) -> Collection[str] | None:
        """Returns the ids of the requests in the engine's last step that had no token of it yet; None: not known."""


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """The socket of an engine of this machine, beside which is the record of its steps."""

    socket: Path

    def __str__(self) -> str:
        return str(self.socket)

    async def connect(self, make: Callable[[], Opened]) -> Opened:
        _, opened = await asyncio.get_running_loop().create_unix_connection(make, str(self.socket))
        return opened

    def in_step(self) -> Collection[str] | None:
        return recorded(step_file(self.socket))


@dataclass(frozen=True, slots=True)
class NetworkAddress:
    """The port of an engine, of this machine or another one.

    Args:
        name: of the engine.
        record: the file in which it records its steps, which is there on its own machine only.
    """

    name: str
    host: str
    port: int
    record: Path

    def __str__(self) -> str:
        return self.name

    async def connect(self, make: Callable[[], Opened]) -> Opened:
        _, opened = await asyncio.get_running_loop().create_connection(make, self.host, self.port)
        return opened

    def in_step(self) -> Collection[str] | None:
        return recorded(self.record) if self.record.exists() else None
