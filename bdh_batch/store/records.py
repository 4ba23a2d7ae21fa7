"""What is remembered of conversations: responses, and states that begin others, each with whose it is and until when.

Records and their tokens lie in a database (`database.py`), states in files beside it (`state_files.py`). Several
processes may use one store at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bdh_batch.errors import StoreFailed
from bdh_batch.store.database import Database
from bdh_batch.store.record import Record
from bdh_batch.store.sealing import SealingFailed
from bdh_batch.store.state_files import StateFile, StateFiles, finish
from bdh_batch.system.threads import DaemonThreads

__all__ = ["NewState", "Record", "StateFile", "Store"]

log = logging.getLogger(__name__)

T = TypeVar("T")

TIDY_SECONDS = 60.0
FILE_THREADS = 4
MOST_WAITING = 1024  # calls: beyond, the store is behind, and says so at once


@dataclass(frozen=True, slots=True)
class NewState:
    """A state that is about to be written: to `path`, whole or not at all, by whoever has it. `Store.adopt` takes it
    in then, and `Store.discard` forgets it."""

    id: str
    path: Path


class Store:
    """Keeps records, and the states of some of them, within limits: what has been used least recently goes.

    Where it is full, room is made by the owner who has most. Files of states go before records: what a state has read
    can be computed again from its record's tokens.

    Its methods raise StoreFailed where they cannot read or write, and are to be called on the event loop.

    Args:
        ttl: seconds that a record is kept that does not say.
        close: is called when the store is closed.
        clock: Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        files: StateFiles,
        ttl: float,
        close: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._files = files
        self._ttl = ttl
        self._close = close
        self._clock = clock
        self._thread = DaemonThreads(1, "bdh-store")
        self._file_thread = DaemonThreads(FILE_THREADS, "bdh-store-files")
        self._waiting = 0
        self._examining: dict[str, asyncio.Task[None]] = {}  # by the ids of states
        self.failures: Counter[str] = Counter()  # by what was tried: "put", "get", "adopt" …; and "damaged"

    async def put(self, record: Record) -> None:
        """Stores a record, in place of an earlier one of its kind and id; returns once it is durable.

        A `state` that is not there (any more) becomes None.

        Raises:
            StoreFull: it is larger than the store, or its owner's part of it, may be.
            StoreFailed
        """
        if record.expires is None:
            record = replace(record, expires=record.created + self._ttl)
        await self._call("put", self._database.put, record, self._clock())

    async def update(self, record: Record) -> bool:
        """Gives a record that is there a new body and tokens; returns False where it is not there any more.

        Raises:
            StoreFull: it is larger than the store, or its owner's part of it, may be.
            StoreFailed
        """
        return await self._call("put", self._database.update, record, self._clock())

    async def get(self, kind: str, id: str, owner: str) -> Record | None:
        """Returns a record; None where there is none, it is somebody else's, or it has expired."""
        return await self._call("get", self._database.get, kind, id, owner, self._clock())

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        """Deletes a record, and its state where no other record has it. Returns whether there was one."""
        return await self._call("delete", self._database.delete, kind, id, owner, self._clock())

    async def list(self, kind: str, owner: str, limit: int, after: str | None = None) -> Sequence[Record]:
        """Returns the newest records of an owner, without their tokens.

        Args:
            after: the id of one; those older than it are returned. Where it is not there, none is.
        """
        return await self._call("list", self._database.list, kind, owner, limit, after, self._clock())

    def new_state(self) -> NewState:
        """Returns an id for a state, and where its file is to be written."""
        id = uuid.uuid4().hex
        return NewState(id, self._files.to_write(id))

    async def write(self, new: NewState, pieces: AsyncIterator[bytes]) -> None:
        """Writes the file of a new state from pieces of it, as they come; what they raise leaves it to be discarded.

        Raises StoreFailed.
        """
        file = await self._call("write", self._files.begin, new.id, thread=self._file_thread)
        try:
            async for piece in pieces:
                await self._call("write", file.write, piece, thread=self._file_thread)
            await self._call("write", finish, file, thread=self._file_thread)
        finally:
            self._file_thread.submit(file.close)

    async def adopt(self, state: str, record: Record) -> bool:
        """Takes in the file that was written for `state` (`new_state`) as the one of a record that has been put.

        Returns False, and removes the file, where that record is not there any more.

        Raises:
            StoreFull: it is larger than the store, or its owner's part of it, may be. The file is removed.
            StoreFailed
        """
        try:
            size = await self._call("adopt", self._files.prepare, state, thread=self._file_thread)
            key = (record.kind, record.id, record.owner)
            return await self._call("adopt", self._database.adopt, state, size, key, self._clock())
        finally:
            self.discard(state)

    def discard(self, state: str) -> None:
        """Removes what was written for a state that is not adopted. Idempotent."""
        self._file_thread.submit(self._files.discard, state)

    async def state_file(self, record: Record) -> StateFile | None:
        """Returns the file of a record's state, which stays readable until it is closed, whatever becomes of the
        record; None where there is none any more, or it is damaged."""
        if record.state is None:
            return None
        try:
            path = await self._call("read", self._files.open, record.state, thread=self._file_thread)
        except SealingFailed as error:
            await self.damaged(record.state, str(error))
            return None
        if path is None:
            return None
        return StateFile(record.state, path, partial(self._file_thread.submit, partial(path.unlink, missing_ok=True)))

    async def damaged(self, state: str, problem: str) -> None:
        """Removes the file of a state in which nothing can begin. Its records stay, whose tokens make it again."""
        self.failures["damaged"] += 1
        log.warning("the file of the state %s is damaged, and is removed: %s", state, problem)
        with contextlib.suppress(StoreFailed):  # which was counted; whoever begins there finds it damaged again
            await self._call("delete", self._database.remove_state, state)

    def examine(self, path: str, problem: Callable[[Path], str | None]) -> None:
        """Looks, in the background, whether the file that `state_file` has given is damaged, and removes it if so.

        Args:
            problem: says what is wrong with a file, which it reads whole; None where nothing is.
        """
        state = self._files.opened_id(path)
        if state not in self._examining:
            task = self._examining[state] = asyncio.create_task(self._examine(state, problem))
            task.add_done_callback(lambda _: self._examining.pop(state))

    async def _examine(self, state: str, problem: Callable[[Path], str | None]) -> None:
        with contextlib.suppress(StoreFailed):  # which was counted
            file = await self.state_file(Record(state, "", "", 0.0, state=state))
            if file is not None:
                try:
                    found = await self._call("read", problem, file.path, thread=self._file_thread)
                finally:
                    file.close()
                if found is not None:
                    await self.damaged(state, found)

    @property
    def process(self) -> str:
        """The name of this process among those that use the store, now or ever."""
        return self._files.process

    async def lives(self, process: str) -> bool:
        """Whether the process of that name uses the store still."""
        return await self._call("read", self._files.lives, process, thread=self._file_thread)

    async def watch(self) -> None:
        """Deletes what has expired, until it is cancelled."""
        while True:
            with contextlib.suppress(StoreFailed):  # which was counted; there is a next time
                await self.tidy()
            await asyncio.sleep(TIDY_SECONDS)

    async def tidy(self) -> None:
        """Deletes what has expired."""
        await self._call("tidy", self._database.tidy, self._clock())

    def held(self) -> Mapping[str, int]:
        """Returns how many records and states there are, and their bytes, as of the last write of this process."""
        return self._database.held

    @property
    def evictions(self) -> Mapping[str, int]:
        """How many records and states this process has removed for want of room or because they had expired."""
        return self._database.evictions

    async def close(self) -> None:
        """Ends the store. Idempotent."""
        for task in [*self._examining.values()]:
            task.cancel()
        closing = self._thread.submit(self._database.close)
        await asyncio.wrap_future(closing)
        await asyncio.wrap_future(self._file_thread.submit(self._close))

    async def _call(
        self, what: str, function: Callable[..., T], *given: object, thread: DaemonThreads | None = None
    ) -> T:
        if self._waiting >= MOST_WAITING:
            self.failures[what] += 1
            raise StoreFailed(f"The store is behind: {self._waiting} calls wait for it.")
        self._waiting += 1
        future = asyncio.wrap_future((thread or self._thread).submit(function, *given))
        future.add_done_callback(self._done)
        try:
            return await future
        except (sqlite3.Error, OSError) as error:
            self.failures[what] += 1
            log.warning("the store failed (%s): %s", what, error)
            raise StoreFailed(f"The store failed: {error}.") from error
        except StoreFailed:
            self.failures[what] += 1
            raise

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._waiting -= 1
