"""Which processes use a store, so that others know what has ended with one."""

from __future__ import annotations

import uuid
from typing import Protocol

from bdh_batch.store.folders import LockedFolder, is_alive
from bdh_batch.store.postgresql import Postgresql


class Presence(Protocol):
    """This process, among those that use the store. All methods may wait, and raise SQLAlchemyError or OSError.

    Attributes:
        process: its name, which no other one has, now or ever.
    """

    process: str

    def beat(self) -> None:
        """Lets others know that it lives; to be called every some seconds."""

    def lives(self, process: str) -> bool:
        """Whether the process of that name uses the store still."""

    def leave(self) -> None:
        """Lets others know that it has ended. Idempotent."""


class InFolder:
    """By the lock on a folder that each process has, which the system gives up with the process.

    Args:
        work: this process's, beside those of the others.
    """

    def __init__(self, work: LockedFolder) -> None:
        self.process = work.path.name
        self._parent = work.path.parent

    def beat(self) -> None:
        """It holds its lock."""

    def lives(self, process: str) -> bool:
        return is_alive(self._parent / process)

    def leave(self) -> None:
        """Its folder goes with its files."""


class InDatabase:
    """By a row of each process, which says when it was last heard of."""

    def __init__(self, driver: Postgresql) -> None:
        self.process = uuid.uuid4().hex
        self._driver = driver

    def beat(self) -> None:
        self._driver.beat(self.process)

    def lives(self, process: str) -> bool:
        return self._driver.lives(process)

    def leave(self) -> None:
        self._driver.leave(self.process)
