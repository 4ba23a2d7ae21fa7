"""Stored responses: what they cost, how long their events are kept, and who runs those in the background."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import orjson
import pytest

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.errors import NotFound
from bdh_batch.http.request.off_loop import LARGE, THREAD, Aside, OffLoop
from bdh_batch.http.responses_api.background import SENT, EventLog
from bdh_batch.http.responses_api.stored import records, saving as saving_module
from bdh_batch.http.responses_api.stored.opening import Opening
from bdh_batch.http.responses_api.stored.records import Conversations, Stored
from bdh_batch.http.responses_api.stored.saving import Saving
from bdh_batch.messages import Delta, FinishReason, SavedState, Usage
from bdh_batch.settings import Store as Chosen
from bdh_batch.store.opening import open_store
from bdh_batch.store.record import Record
from bdh_batch.store.records import StateFile, Store
from tests.conftest import eventually
from tests.http.response_events import in_order
from tests.http.test_responses import events_in

if TYPE_CHECKING:
    from bdh_batch.backends.base import Ended
    from tests.conftest import ServeFactory

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PATH = "/v1/responses"
LONG: dict[str, Any] = {"input": "a", "background": True, "max_output_tokens": 100_000, "ignore_eos": True}


def event(number: int, size: int = 0) -> bytes:
    return b'event: a\ndata: {"sequence_number":%d,"text":"%b"}\n\n' % (number, b"x" * size)


async def numbers(log: EventLog, after: int) -> list[int]:
    """Those of the events behind number `after`."""
    text = b"".join([part async for part in log.read(after)]).decode()
    *data, done = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(each)["sequence_number"] for each in data]


class TestEventLog:
    @pytest.mark.parametrize("size", [0, SENT // 3, SENT * 2])
    async def test_is_read_from_any_event_on(self, size: int) -> None:
        log = EventLog(2**30)
        for number in range(0, 12, 3):
            log.add(b"".join(event(number + i, size) for i in range(3)), number + 3)
        log.end()
        for after in range(-1, 13):
            assert await numbers(log, after) == list(range(after + 1, 12))

    async def test_is_read_while_more_come(self) -> None:
        log = EventLog(2**30)
        reading = asyncio.create_task(numbers(log, 0))
        for number in range(5):
            log.add(event(number), number + 1)
            await asyncio.sleep(0)
        log.end()
        assert await reading == [1, 2, 3, 4]

    async def test_silence_is_broken(self) -> None:
        log = EventLog(2**30)
        parts = log.read(-1, keepalive=0.01)
        assert await anext(parts) == b": keep-alive\n\n"
        log.end()
        assert [part async for part in parts if not part.startswith(b":")] == [b"data: [DONE]\n\n"]

    async def test_keeps_the_newest(self) -> None:
        log = EventLog(10_000)
        parts = log.read(-1)
        for number in range(1000):
            log.add(event(number, 100), number + 1)
            assert sum(map(len, log._groups)) <= 10_000
        log.add(event(1000, 20_000), 1001)
        log.end()
        assert log.earliest == 1000
        assert await numbers(log, 999) == [1000]
        late = await anext(parts)
        assert late.startswith(b"event: error\n")
        assert b"limits.max_background_bytes" in late
        assert late.endswith(b"data: [DONE]\n\n")
        assert await anext(parts, None) is None


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = open_store(Chosen(path=tmp_path))
    yield opened
    await opened.close()


@pytest.fixture
def aside() -> Aside:
    return OffLoop().of("me")


def stored(number: int, text: str = "a") -> Stored:
    id = f"{number:032x}"
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": [1, 2]}
    output = [{"type": "message", "id": f"msg_{id}_0", "role": "assistant", "content": [part]}]
    made = {"id": f"resp_{id}", "created_at": time.time(), "previous_response_id": None, "output": output}
    asked = {"type": "message", "id": f"msg_{id}_i0", "role": "user", "content": [{"type": "input_text", "text": text}]}
    return Stored(made, [asked], tokens=[1, 2, 3])


class TestConversations:
    async def test_long_ones_are_worked_on_off_the_event_loop(
        self, store: Store, aside: Aside, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads: list[str] = []

        class Watched(SimpleNamespace):
            def dumps(self, value: Any) -> bytes:
                threads.append(threading.current_thread().name)
                return orjson.dumps(value)

            def loads(self, raw: bytes) -> Any:
                threads.append(threading.current_thread().name)
                return orjson.loads(raw)

        monkeypatch.setattr(records, "orjson", Watched())
        conversations = Conversations(store, 2**22)
        for size, expected in ((0, threading.current_thread().name), (LARGE + 1, THREAD)):
            made = stored(size, "a" * size)
            assert await conversations.put(made, "me", aside, size, True)
            found = await conversations.find(made.response["id"], "me", aside)
            assert found.response == made.response
            assert {*threads} == {expected}
            threads.clear()

    async def test_a_record_that_is_too_large_is_not_stored(self, store: Store, aside: Aside) -> None:
        conversations = Conversations(store, 1000)
        assert await conversations.put(stored(0, "a" * 500), "me", aside, 500, True)
        assert not await conversations.put(stored(1, "a" * 1500), "me", aside, 1500, True)

    async def test_where_the_store_fails_a_response_is_not_stored(self, store: Store, aside: Aside) -> None:
        conversations = Conversations(store, 1000)
        with store._database._driver.writing.begin() as connection:
            connection.exec_driver_sql("DROP TABLE records")
        assert not await conversations.put(stored(1), "me", aside, 0, True)
        assert store.failures == {"put": 1}

    async def test_items_are_referred_to_within_bounds(self, store: Store, aside: Aside) -> None:
        conversations = Conversations(store, 1000)
        await conversations.put(stored(1, "a" * 100), "me", aside, 100, True)

        def refer(*numbers: int) -> list[dict[str, Any]]:
            return [{"type": "item_reference", "id": f"msg_{number:032x}_0"} for number in numbers]

        items, size = await conversations.resolved(refer(1), "me", aside)
        assert items[0]["content"] == [{"type": "output_text", "text": "a" * 100, "annotations": [], "logprobs": []}]
        assert 100 < size < 1000
        with pytest.raises(NotFound, match="Item with id"):
            await conversations.resolved(refer(1), "somebody", aside)
        with pytest.raises(InvalidRequest, match="max_body_bytes") as caught:
            await conversations.resolved(refer(1) * 10_000, "me", aside)
        assert caught.value.param == "input[3].id"
        gets = _count_gets(store)
        with pytest.raises(InvalidRequest, match="at most 1024"):
            await conversations.resolved(refer(*range(10_000)), "me", aside)
        assert not gets

    async def test_a_long_chain_is_not_walked(self, store: Store, aside: Aside) -> None:
        conversations, gets = Conversations(store, 2**22), _count_gets(store)
        before = None
        for number in range(500):
            value = stored(number)
            if before is not None:
                found = await conversations.find(before, "me", aside)
                value = Stored(value.response | {"previous_response_id": before}, [*found.items[-3:], *value.input])
            await conversations.put(value, "me", aside, 0, True)
            before = value.response["id"]
        assert len(gets) == 499


def _count_gets(store: Store) -> list[str]:
    """The ids that the store is asked for from now on."""
    found: list[str] = []
    get = store._database.get

    def watched(kind: str, id: str, *rest: Any) -> Any:
        found.append(id)
        return get(kind, id, *rest)

    store._database.get = watched  # type: ignore[method-assign, assignment]
    return found


class Written:
    """A generation whose state is written when it has ended, or, where `late`, after its reader has gone."""

    prompts, cached_tokens = [[1, 2]], [0]

    def __init__(self, path: Path, late: bool = False) -> None:
        self.path = path
        self.aborted = 0
        self.written = asyncio.Event()
        self._late = late

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        yield [(0, Delta("a", [3]))]
        yield [(0, Delta("b", [4], FinishReason.LENGTH))]
        self.write()
        yield [(0, Delta(saved=SavedState(str(self.path), 3)))]

    def usage(self, completion_tokens: int) -> Usage:
        return Usage(2, completion_tokens)

    def abort(self) -> None:
        self.aborted += 1
        if self._late:
            asyncio.get_running_loop().call_soon(self.write)

    def on_end(self, ended: Ended) -> None:
        raise NotImplementedError

    def write(self) -> None:
        self.path.write_bytes(b"state")
        self.written.set()


class TestSaving:
    async def test_its_reader_does_not_wait_for_the_file(self, store: Store, aside: Aside) -> None:
        new = store.new_state()
        generation = Written(new.path)
        saving = Saving(generation, new, store)
        assert [delta.text for deltas in [each async for each in saving] for _, delta in deltas] == ["a", "b"]
        assert not new.path.exists()
        conversations, value = Conversations(store, 2**22), stored(1)
        await conversations.put(value, "me", aside, 0, True)
        conversations.adopt(saving, value, "me", aside)
        saving.abort()  # as its reader does in any case
        await conversations.close()
        assert generation.aborted == 1
        found = await conversations.find(value.response["id"], "me", aside)
        assert (found.kept, found.read) == (new.id, 3)
        state = await conversations.state(found, "me", aside, waits=False)
        assert state is not None
        assert await asyncio.to_thread(Path(state[0].path).read_bytes) == b"state"

    async def test_a_turn_looks_for_the_state_that_another_process_writes(
        self, store: Store, aside: Aside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new, other = store.new_state(), open_store(Chosen(path=tmp_path))
        saving = Saving(Written(new.path), new, store)
        assert [each async for each in saving]
        here, there, gets = Conversations(store, 2**22), Conversations(other, 2**22), _count_gets(other)
        value = replace(stored(1), expected=time.time(), saver=store.process)
        await here.put(value, "me", aside, 0, True)
        waiting = asyncio.create_task(there.state(value, "me", aside, waits=True))
        await asyncio.to_thread(eventually, lambda: len(gets) >= 2)
        here.adopt(saving, value, "me", aside)
        state = await waiting
        assert state is not None
        assert state[0].tokens == 3
        monkeypatch.setattr(records, "LOOK_SECONDS", 0.05)  # one that does not come is not waited for for long
        late, past = (replace(stored(2 + at), expected=time.time() - 6 * at, saver=store.process) for at in range(2))
        for each, looks in ((late, 3), (past, 1)):
            gets.clear()
            await here.put(each, "me", aside, 0, True)
            assert await there.state(each, "me", aside, waits=True) is None
            assert 1 <= len(gets) <= looks
        await other.close()

    async def test_turns_that_do_not_take_their_state_leave_no_fetch_and_no_file(
        self, store: Store, aside: Aside, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        conversations, fetched, fetching, go_on = Conversations(store, 2**22), Counter[str](), 0, asyncio.Event()

        async def fetch(record: Record) -> StateFile:
            nonlocal fetching
            fetching += 1
            begun.set()
            await go_on.wait()
            fetching -= 1
            return StateFile("state", Path("state"), partial(fetched.update, ["closed"]))

        monkeypatch.setattr(store, "state_file", fetch)

        async def turn(taken: bool, refused: bool) -> None:
            with ExitStack() as cleanup:
                state = conversations.state(stored(1), "me", aside, waits=False)
                async with Opening(state, cleanup) as opening:
                    await begun.wait()
                    if taken:
                        assert await opening.take() is not None
                        assert not fetched
                    if refused:
                        raise InvalidRequest("no", "input")

        before = asyncio.all_tasks()
        for taken, refused, cancelled in (
            (True, False, False),
            (False, False, False),
            (False, True, False),
            (True, False, True),
        ):
            begun = asyncio.Event()
            fetched.clear()
            go_on.clear()
            turns = asyncio.create_task(turn(taken, refused))
            await begun.wait()
            await asyncio.sleep(0)
            if cancelled:
                turns.cancel()
            assert not turns.done()  # while a fetch is under way
            go_on.set()
            await asyncio.wait([turns])
            assert (fetching, fetched["closed"], asyncio.all_tasks()) == (0, 1, before)
            assert turns.cancelled() == cancelled
            if not cancelled:
                assert isinstance(turns.exception(), InvalidRequest) == refused
        with ExitStack() as cleanup:
            async with Opening(None, cleanup) as opening:
                assert await opening.take() is None

    async def test_a_file_that_nobody_waits_for_goes_also_where_it_comes_late(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saving_module, "SAVE_SECONDS", 0.05)
        new = store.new_state()
        generation = Written(new.path, late=True)
        saving = Saving(generation, new, store)
        await anext(aiter(saving))
        saving.abort()
        await generation.written.wait()
        await asyncio.to_thread(eventually, lambda: not new.path.exists())

    async def test_a_state_that_has_read_more_than_is_known_of_it_is_not_kept(self, store: Store, aside: Aside) -> None:
        new = store.new_state()
        saving = Saving(Written(new.path), new, store)
        assert [each async for each in saving]
        conversations, value = Conversations(store, 2**22), replace(stored(1), tokens=[1, 2])
        await conversations.put(value, "me", aside, 0, True)
        conversations.adopt(saving, value, "me", aside)
        await conversations.close()
        found = await conversations.find(value.response["id"], "me", aside)
        assert found.kept is None
        assert await conversations.state(found, "me", aside, waits=False) is None


def test_what_the_server_ends_has_failed_and_its_readers_hear_of_it(serve: ServeFactory, tmp_path: Path) -> None:
    options = (f"store.path={tmp_path}", "server.drain_seconds=0.5")
    with serve(*options, model=TINY) as server:
        begun = server.http.post(PATH, json=LONG).json()
        url = f"{server.url}{PATH}/{begun['id']}?stream=true"
        with httpx.stream("GET", url, timeout=300) as reading:
            pieces = reading.iter_bytes()  # its lines would end within a text that has a U+0085
            seen = next(pieces)
            server.terminate()
            seen += b"".join(pieces)
        assert in_order(events_in(seen.decode()))["status"] == "failed"
        assert server.exit_code() == 0
    with serve(*options, model=TINY) as server:
        found = server.http.get(f"{PATH}/{begun['id']}").json()
        assert found["status"] == "failed"
        assert "shutting down" in found["error"]["message"]


def test_another_process_runs_it(serve: ServeFactory, tmp_path: Path) -> None:
    options = (f"store.path={tmp_path}",)
    with serve(*options, model=TINY) as server, serve(*options, model=TINY) as other:
        begun = server.http.post(PATH, json=LONG).json()
        path = f"{PATH}/{begun['id']}"
        assert other.http.get(path).json()["status"] in ("queued", "in_progress")
        assert other.error(other.http.get(path, params={"stream": "true"}), 400)["param"] == "stream"
        assert other.http.post(f"{path}/cancel").json()["status"] == "cancelled"
        assert other.http.post(f"{path}/cancel").json()["status"] == "cancelled"
        server.until_idle()
        second = f"{PATH}/{server.http.post(PATH, json=LONG).json()['id']}"
        assert other.http.delete(second).json()["deleted"]
        server.until_idle()
        assert server.http.get(second).status_code == 404
        asyncio.run(_as_if_killed(tmp_path, begun["id"]))
        found = other.http.get(path).json()
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
        assert server.http.get(path).json()["status"] == "cancelled"  # it remembers


async def _as_if_killed(path: Path, id: str) -> None:
    """Makes a response one that is under way in a process which is no more."""
    with contextlib.closing(sqlite3.connect(path / "records.sqlite3")) as database:
        ((owner,),) = database.execute("SELECT DISTINCT owner FROM records")
    store = open_store(Chosen(path=path))
    record = await store.get("response", id, owner)
    assert record is not None
    body = orjson.loads(record.body)
    body["process"] = store.process
    body["response"]["status"] = "in_progress"
    assert await store.update(replace(record, body=orjson.dumps(body)))
    await store.close()
