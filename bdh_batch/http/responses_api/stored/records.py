"""Responses as they are stored, and where they are found again."""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from bdh_batch.errors import BDHError, InvalidRequest
from bdh_batch.http.errors import NotFound
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses_api.stored.saving import Saving
from bdh_batch.messages import SavedState
from bdh_batch.store.record import Record, reading
from bdh_batch.store.records import StateFile, Store

log = logging.getLogger(__name__)

KIND = "response"
UNFINISHED = ("queued", "in_progress")
ADOPT_SECONDS = 5.0  # that a turn waits for the state of the one before it
ON_ITS_WAY_SECONDS = 5.0  # after the end of a response, in which its state is looked for where another process saves it
LOOK_SECONDS, FIRST_LOOK = 2.0, 0.02  # for which a turn looks for it; until the first look, and twice that each time
CLOSE_SECONDS = 2.0  # that the end of the server waits for states
TOKENS_TO_JSON = 16  # bytes of tokens take no longer than one of JSON
MOST_REFERRED = 1024  # responses whose items one request may refer to
Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """A response that is stored.

    Args:
        response: as it is returned.
        input: all items that it was made of, those of the turns before it included.
        length, digest: of the text of its prompt; None where its tokens do not stand for that.
        said: what was generated after it, as far as its tokens stand for that.
        model: the revision of the model whose tokens they are.
        name: what that model is called.
        begun: how many of the tokens are those of a state that the conversation began in, and `salt` what that has.
        read: how many of the tokens have entered its state, if it has one.
        process: the one that it is under way in (`Store.process`); None where it has ended.
        expected: when it ended, where its state is written after that, in seconds since the epoch; else 0.
        prefix_salt: of its request, and of the state that the conversation began in: inside which its prefixes are
            cached. None is unknown: an earlier version has stored it.
        saver: the process that writes it (`Store.process`).
        kept: the id of its state's file; None where it has none.
        size: how much there was to be read of its record, in bytes of JSON.
    """

    response: dict[str, Any]
    input: Sequence[Item]
    length: int | None = None
    digest: str = ""
    model: str | None = None
    read: int = 0
    process: str | None = None
    tokens: Sequence[int] = ()
    kept: str | None = None
    size: int = 0
    said: str = ""
    name: str = ""
    begun: int = 0
    salt: str = ""
    expected: float = 0.0
    saver: str = ""
    prefix_salt: str | None = None

    @property
    def is_expected(self) -> bool:
        """Whether it has no state yet, and may get it soon."""
        return self.kept is None and abs(time.time() - self.expected) < ON_ITS_WAY_SECONDS

    @property
    def items(self) -> list[Item]:
        """What the next turn goes on from."""
        return [*self.input, *map(_without_logprobs, self.response["output"])]

    def bare(self, owner: str) -> Record:
        """What the store needs to find its record, or its state."""
        return Record(self.response["id"], KIND, owner, self.response["created_at"], state=self.kept)

    def record(self, owner: str) -> Record:
        names = ("response", "input", "length", "digest", "said", "model", "read", "process", "name", "begun", "salt")
        body = {name: getattr(self, name) for name in (*names, "expected", "saver", "prefix_salt")}
        return Record(
            id=self.response["id"],
            kind=KIND,
            owner=owner,
            created=self.response["created_at"],
            parent=self.response["previous_response_id"],
            body=orjson.dumps(body),
            tokens=array("i", self.tokens).tobytes(),
        )

    @classmethod
    def of(cls, record: Record) -> Stored:
        """Raises RecordDamaged."""
        with reading(record):
            tokens = array("i", record.tokens)
            return cls(**orjson.loads(record.body), tokens=tokens, kept=record.state, size=_work(record))


def _without_logprobs(item: Item) -> Item:
    if item["type"] != "message":
        return item
    return {**item, "content": [{**part, "logprobs": []} for part in item["content"]]}


class Conversations:
    """The stored responses of all callers. What takes long is done aside.

    Args:
        most: bytes of a conversation, in JSON. A response that has twice as many, with all before it, is not stored.
    """

    def __init__(self, store: Store, most: int) -> None:
        self.store = store
        self.most = most
        self._adopting: dict[str, asyncio.Task[None]] = {}  # by the ids of the responses

    async def close(self) -> None:
        """Returns once all states are stored that are on their way, or soon. Idempotent."""
        if self._adopting:
            _, late = await asyncio.wait(self._adopting.values(), timeout=CLOSE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def find(self, id: str, owner: str, aside: Aside, param: str | None = None) -> Stored:
        """The response of that id. Raises NotFound: there is none, none any more, or it is somebody else's."""
        record = await self.store.get(KIND, id, owner) if id.startswith("resp_") else None
        if record is None:
            previous = param == "previous_response_id"
            what, code = ("Previous response", "previous_response_not_found") if previous else ("Response", "not_found")
            raise NotFound(f"{what} with id {id[:128]!r} not found.", param, code)
        return await aside.run(_work(record), Stored.of, record)

    async def resolved(self, items: Sequence[dict[str, Any]], owner: str, aside: Aside) -> tuple[list[Item], int]:
        """The items, with those that are referred to by their ids, and about how many bytes these have.

        Raises:
            NotFound
            InvalidRequest: there is too much of them.
        """
        wanted: dict[str, set[str]] = {}  # by the id of the response that has them
        for item in items:
            if item["type"] == "item_reference":
                wanted.setdefault(_response_of(item["id"]), set()).add(item["id"])
        if len(wanted) > MOST_REFERRED:
            text = f"input: Items of {len(wanted)} responses are referred to, of at most {MOST_REFERRED}."
            raise InvalidRequest(text, "input")
        known: dict[str, Item] = {}
        for id, ids in wanted.items():
            if (record := await self.store.get(KIND, id, owner)) is not None:
                known |= await aside.run(_work(record), _items_of, record, ids)
        weights = {id: weight([item]) for id, item in known.items()}
        found: list[Item] = []
        total = 0
        for index, item in enumerate(items):
            if item["type"] != "item_reference":
                found.append(item)
            elif (id := item["id"]) not in known:
                raise NotFound(f"Item with id {id[:128]!r} not found.", f"input[{index}].id", "not_found")
            else:
                found.append(known[id])
                total += weights[id]
                self.check(total, f"input[{index}].id")
        return found, total

    async def state(
        self, before: Stored, owner: str, aside: Aside, waits: bool
    ) -> tuple[SavedState, Callable[[], object]] | None:
        """The state of a stored response, and what is to be called when it is not read any more; None where there is
        none (any more).

        Args:
            waits: for one that is on its way, as the engine may not have it cached. It takes a while.

        Where this is cancelled, a file that is being fetched is first waited for, and closed.
        """
        if waits and before.kept is None:
            before = await self._with_state(before.response["id"], owner, aside)
        try:
            file = await _to_its_end(self.store.state_file(before.bare(owner)))
        except BDHError:  # which was counted; the tokens are there
            return None
        return None if file is None else (SavedState(str(file.path), before.read), file.close)

    async def _with_state(self, id: str, owner: str, aside: Aside) -> Stored:
        """The response of that id, once its state is stored, or has not come in time. Raises NotFound."""
        param = "previous_response_id"
        if (adopting := self._adopting.get(id)) is not None:
            await asyncio.wait([adopting], timeout=ADOPT_SECONDS)
        found, pause = await self.find(id, owner, aside, param), FIRST_LOOK
        end = time.monotonic() + LOOK_SECONDS
        while found.is_expected and found.saver != self.store.process and time.monotonic() < end:
            await asyncio.sleep(pause)
            found, pause = await self.find(id, owner, aside, param), 2 * pause
        return found

    def adopt(self, saving: Saving, value: Stored, owner: str, aside: Aside) -> None:
        """Stores the state of a response that has been put, as soon as it is written."""
        if not saving.keep():
            return
        task = asyncio.create_task(self._adopt(saving, value, owner, aside))
        self._adopting[value.response["id"]] = task
        task.add_done_callback(partial(self._adopted, value.response["id"]))

    async def _adopt(self, saving: Saving, value: Stored, owner: str, aside: Aside) -> None:
        saved = await saving.saved()
        if saved is None or not 0 < saved.tokens <= len(value.tokens):
            saving.discard()
        elif saved.tokens == value.read or await self.put(
            replace(value, read=saved.tokens), owner, aside, value.size, new=False
        ):
            await saving.adopt(value.bare(owner))
        else:
            saving.discard()

    def _adopted(self, id: str, task: asyncio.Task[None]) -> None:
        del self._adopting[id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the state of a response was not stored", exc_info=error)

    def check(self, size: int, param: str) -> None:
        """Raises InvalidRequest: a conversation of so many bytes is too long."""
        if size > self.most:
            text = f"With what is stored of it, the conversation has more than {self.most} bytes"
            raise InvalidRequest(f"{text} (limits.max_body_bytes).", param)

    async def put(self, value: Stored, owner: str, aside: Aside, size: int, new: bool) -> bool:
        """Stores a response; returns whether that went well. The store counts and logs its failures.

        Args:
            size: about how many bytes it has.
            new: else it is stored only where it has not been deleted.
        """
        record = await aside.run(size, value.record, owner)
        if len(record.body) > 2 * self.most:
            return False
        try:
            if not new:
                return await self.store.update(record)
            await self.store.put(record)
        except BDHError:
            return False
        return True


async def _to_its_end(fetching: Coroutine[Any, Any, StateFile | None]) -> StateFile | None:
    """Returns what a fetch returns. Where this is cancelled, the fetch ends first, and its file is closed: no request
    that has ended has one under way (`Opening`)."""
    task = asyncio.create_task(fetching)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.add_done_callback(_close_file)
        await asyncio.wait([task])
        raise
    return task.result()


def _close_file(task: asyncio.Task[StateFile | None]) -> None:
    if not task.cancelled() and task.exception() is None and (file := task.result()) is not None:
        file.close()


def _work(record: Record) -> int:
    """How much there is to be read of a record, in bytes of JSON: tokens are only copied."""
    return len(record.body) + len(record.tokens) // TOKENS_TO_JSON


def _response_of(item: str) -> str:
    """The id of the response that an item belongs to."""
    return f"resp_{item.partition('_')[2].partition('_')[0]}"


def _items_of(record: Record, ids: set[str]) -> dict[str, Item]:
    return {item["id"]: item for item in Stored.of(record).items if item["id"] in ids}


def weight(items: Sequence[Item]) -> int:
    """The bytes of items, in JSON."""
    return len(orjson.dumps(items))
