"""What is remembered of conversations: responses, and states that begin others, each with whose it is and until when.

Records and their tokens lie in a database (`database.py`), states in files (`state_files.py`). Several processes may
use one store at a time; where both are shared, on several machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from bdh_batch.errors import StoreFailed
from bdh_batch.store.calls import StoreCalls
from bdh_batch.store.database import Database
from bdh_batch.store.presence import Presence
from bdh_batch.store.record import Record
from bdh_batch.store.sealing import SealingFailed
from bdh_batch.store.state_files import StateFile, StateFiles, finish

__all__ = ["NewState", "Record", "StateFile", "Store"]

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_SECONDS, BEATS = 10.0, 6  # between two signs of life, and how many there are until the store is tidied up


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
        calls: makes the calls of the database and of the files.
        ttl: seconds that a record is kept that does not say.
        close: is called when the store is closed.
        clock: Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        files: StateFiles,
        presence: Presence,
        calls: StoreCalls,
        ttl: float,
        close: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._files = files
        self._presence = presence
        self._calls = calls
        self._ttl = ttl
        self._close = close
        self._clock = clock
        self._database = database
        self._examining: dict[str, asyncio.Task[None]] = {}  # by the ids of states
        self._removing: asyncio.Task[None] | None = None

    async def put(self, record: Record) -> None:
        """Stores a record, in place of an earlier one of its kind and id; returns once it is durable.

        A `state` that is not there (any more) becomes None.

        Raises:
            StoreFull: it is larger than the store, or its owner's part of it, may be.
            StoreFailed
        """
        if record.expires is None:
            record = replace(record, expires=record.created + self._ttl)
        await self._query("put", self._database.put, record, self._clock())

    async def update(self, record: Record) -> bool:
        """Gives a record that is there a new body and tokens; returns False where it is not there any more.

        Raises:
            StoreFull: it is larger than the store, or its owner's part of it, may be.
            StoreFailed
        """
        return await self._query("put", self._database.update, record, self._clock())

    async def get(self, kind: str, id: str, owner: str) -> Record | None:
        """Returns a record; None where there is none, it is somebody else's, or it has expired."""
        return await self._query("get", self._database.get, kind, id, owner, self._clock())

    async def latest(self, kind: str, most: int) -> Sequence[tuple[str, str]]:
        """Returns the ids and owners of the records whose states were used last, in this order, of at most so many;
        without those that another one of them goes on from."""
        return await self._query("read", self._database.latest, kind, most, self._clock())

    async def peek(self, kind: str, id: str, owner: str) -> Record | None:
        """As `get`, without counting as a use."""
        return await self._query("read", self._database.get, kind, id, owner, self._clock(), False)

    @property
    def is_local(self) -> bool:
        """Whether all of it is in a folder of this machine."""
        return not self._database.announces

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        """Deletes a record, and its state where no other record has it. Returns whether there was one."""
        return await self._query("delete", self._database.delete, kind, id, owner, self._clock())

    async def list(self, kind: str, owner: str, limit: int, after: str | None = None) -> Sequence[Record]:
        """Returns the newest records of an owner, without their tokens and without those that cannot be decrypted.

        Args:
            after: the id of one; those older than it are returned. Where it is not there, none is.
        """
        found, damaged = await self._query("list", self._database.list, kind, owner, limit, after, self._clock())
        for id, problem in damaged.items():
            self.left_out(id, problem)
        return found

    def left_out(self, id: str, problem: str) -> None:
        """Counts a record that a list does not show, as it is damaged."""
        self.failures["damaged"] += 1
        log.warning("the record %s is damaged, and left out: %s", id, problem)

    def not_saved(self, reason: str) -> None:
        """Counts a state that its engine has not written."""
        self.failures["save"] += 1
        log.warning("the store failed (save): %s", reason)

    def new_state(self) -> NewState:
        """Returns an id for a state, and where its file is to be written."""
        id = uuid.uuid4().hex
        return NewState(id, self._files.to_write(id))

    async def write(self, new: NewState, pieces: AsyncIterator[bytes]) -> None:
        """Writes the file of a new state from pieces of it, as they come; what they raise leaves it to be discarded.

        Raises StoreFailed.
        """
        calls = self._calls.files
        file = await calls.call("write", self._files.begin, new.id, unclaimed=partial(self._undo, new.id))
        try:
            async for piece in pieces:
                await calls.call("write", file.write, piece)
            await calls.call("write", finish, file)
        finally:
            calls.submit(file.close)

    def _undo(self, state: str, file: BinaryIO) -> None:
        file.close()
        self._files.discard(state)

    async def adopt(self, state: str, record: Record) -> bool:
        """Takes in the file that was written for `state` (`new_state`) as the one of a record that has been put.

        Returns False, and removes the file, where that record is not there any more.

        Raises:
            StoreFull: it is larger than the store, or its owner's part of it, may be. The file is removed.
            StoreFailed
        """
        uploaded = False
        try:
            if self._database.announces:
                self._calls.kept.check("adopt")  # else each would be announced while nothing can come
            size = await self._calls.files.call("adopt", self._files.prepare, state)
            if self._database.announces:
                await self._query("adopt", self._database.announce, state, self._clock())
                await self._calls.kept.call("adopt", self._files.upload, state)
                uploaded = True
            key = (record.kind, record.id, record.owner)
            return await self._query("adopt", self._database.adopt, state, size, key, self._clock())
        except StoreFailed:
            if uploaded:  # one that has failed may arrive yet: it goes when nobody expects it any more
                with contextlib.suppress(StoreFailed):  # then this one does, too
                    await self._query("remove", self._database.give_up, state)
            raise
        finally:
            self.discard(state)

    def discard(self, state: str) -> None:
        """Removes what was written for a state that is not adopted. Idempotent."""
        self._calls.files.submit(self._files.discard, state)

    async def state_file(self, record: Record) -> StateFile | None:
        """Returns the file of a record's state, which stays readable until it is closed, whatever becomes of the
        record; None where there is none any more, or it is damaged."""
        if record.state is None:
            return None
        close = self._files.close_opened
        try:
            path = await self._calls.kept.call("read", self._files.open, record.state, unclaimed=close)
        except SealingFailed as error:
            await self.damaged(record.state, str(error))
            return None
        if path is None:
            return None
        return StateFile(record.state, path, partial(self._calls.files.submit, close, path))

    async def damaged(self, state: str, problem: str) -> None:
        """Removes the file of a state in which nothing can begin. Its records stay, whose tokens make it again."""
        self.failures["damaged"] += 1
        log.warning("the file of the state %s is damaged, and is removed: %s", state, problem)
        with contextlib.suppress(StoreFailed):  # which was counted; whoever begins there finds it damaged again
            await self._query("delete", self._database.remove_state, state)

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
                    found = await self._calls.files.call("read", problem, file.path)
                finally:
                    file.close()
                if found is not None:
                    await self.damaged(state, found)

    @property
    def process(self) -> str:
        """The name of this process among those that use the store, now or ever."""
        return self._presence.process

    async def lives(self, process: str) -> bool:
        """Whether the process of that name uses the store still."""
        return await self._query("read", self._presence.lives, process)

    async def watch(self) -> None:
        """Deletes what has expired, and lets others know that this process lives, until it is cancelled."""
        for number in itertools.count():
            with contextlib.suppress(StoreFailed):  # which was counted; there is a next time
                await self._query("tidy", self._presence.beat)
                if number % BEATS == 0:
                    await self.tidy()
            await asyncio.sleep(BEAT_SECONDS)

    async def tidy(self) -> None:
        """Deletes what has expired."""
        await self._query("tidy", self._database.tidy, self._clock())

    def held(self) -> Mapping[str, int]:
        """Returns how many records and states there are, and their bytes, as of the last write of this process."""
        return self._database.held

    @property
    def evictions(self) -> Mapping[str, int]:
        """How many records and states this process has removed for want of room or because they had expired."""
        return self._database.evictions

    @property
    def failures(self) -> Counter[str]:
        """How many calls have failed, by what was tried: "put", "get", "adopt" …; and "damaged"."""
        return self._calls.failures

    async def close(self) -> None:
        """Ends the store. Idempotent."""
        for task in [*self._examining.values(), *([] if self._removing is None else [self._removing])]:
            task.cancel()
        self._calls.close()
        await self._calls.database.last(self._end)
        await self._calls.files.last(self._close)

    def _end(self) -> None:
        with contextlib.suppress(SQLAlchemyError):  # its server is gone: it is not heard of any more, either
            self._presence.leave()
        self._database.close()

    async def _query(self, what: str, function: Callable[..., T], *given: object) -> T:
        result = await self._calls.database.call(what, function, *given)
        if self._database.leftovers and self._removing is None:
            self._removing = asyncio.create_task(self._remove_leftovers())
        return result

    async def _remove_leftovers(self) -> None:
        """Removes files of states that are gone. Where that fails, the next try is a while later."""
        query = self._calls.database.call
        try:
            while ids := await query("remove", self._database.to_remove, self._clock()):
                for id in ids:  # each has its time
                    await self._calls.kept.call("remove", self._files.remove, id)
                await query("remove", self._database.have_removed, ids)
        except StoreFailed:  # which was counted
            await asyncio.sleep(BEATS * BEAT_SECONDS)
        finally:
            self._removing = None
