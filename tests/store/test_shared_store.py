"""A store that servers on several machines share: a real PostgreSQL, and files of states in fsspec's file systems."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy.exc import DBAPIError

from bdh_batch.errors import ConfigError, StoreFailed
from bdh_batch.settings import Store as Chosen, load
from bdh_batch.store.circuit import Circuit, Unreachable
from bdh_batch.store.database import UPLOAD_SECONDS
from bdh_batch.store.opening import open_store
from bdh_batch.store.postgresql import WRITE_LOCK
from benchmarks.stress.store_kills import Kills, content
from tests.conftest import CONFORMANCE, ServeFactory, Server, eventually
from tests.store.postgresql import Postgresql
from tests.store.test_store import (  # noqa: F401 - they hold here, too
    Clock,
    Settings,
    files,
    left,
    opened,
    record,
    test_a_callers_own_limit_leaves_others_alone,
    test_a_damaged_state_is_counted_and_removed_and_harms_nothing_else,
    test_a_record_that_does_not_say_expires_by_the_setting,
    test_a_state_that_is_deleted_stays_readable_to_who_uses_it,
    test_another_key_is_refused_at_start,
    test_deleting_while_it_is_adopted_leaves_no_file,
    test_lists_go_from_the_newest_on,
    test_nobody_else_finds_changes_or_deletes_a_record,
    test_records_share_a_state_which_goes_with_the_last_one,
    test_room_is_made_by_who_has_most,
    test_states_go_before_records_and_the_least_recently_used_first,
    test_the_latest_are_those_whose_states_were_used_last_and_to_peek_is_no_use,
    test_two_servers_share_a_store,
    test_what_has_expired_is_not_found_and_its_file_goes,
    test_what_was_deleted_is_not_updated,
    test_what_was_put_is_there_after_a_restart,
    test_whether_a_process_lives_is_known_to_others,
    with_state,
)

SHORT = 3.0  # seconds that a store waits for what does not respond


class Unsteady(MemoryFileSystem):  # type: ignore[misc]
    """An object store that can be made to fail, as those do that cannot be reached: with errors of their own."""

    protocol = "unsteady"
    store: dict[str, Any] = {}  # noqa: RUF012 - as the base has it
    pseudo_dirs = [""]  # noqa: RUF012
    fails = False

    def _check(self) -> None:
        if Unsteady.fails:
            raise RuntimeError("EndpointConnectionError: no route")

    def info(self, path: str, **options: Any) -> Any:
        self._check()
        return super().info(path, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._check()
        super().put_file(lpath, rpath, **options)

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self._check()
        super().get_file(rpath, lpath, **options)

    def rm_file(self, path: str) -> None:
        self._check()
        super().rm_file(path)


fsspec.register_implementation("unsteady", Unsteady)


@pytest.fixture
def settings(database: str, tmp_path: Path) -> Settings:
    return {"path": tmp_path, "url": database, "states_url": f"file://{tmp_path}/states"}


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Until a call of the store succeeds."""
    while True:
        try:
            await condition()
        except StoreFailed:
            await asyncio.sleep(0.05)
        else:
            return


async def test_machines_share_all_but_a_folder(database: str, tmp_path: Path) -> None:
    """Each has a folder of its own, which is nobody else's: one of them is a temporary one."""
    shared = {"url": database, "states_url": "memory://machines/states", "max_records": 10, "max_bytes_per_key": 9000}
    async with opened({"path": tmp_path / "one", **shared}) as one, opened({"path": None, **shared}) as two:
        of = await with_state(one, record("a"), b"state" * 200)
        assert await two.get("response", "a", "me") == of
        assert await content(two, of) == b"state" * 200
        assert await two.update(record("a", body=b"{1}"))
        found = await one.get("response", "a", "me")
        assert found is not None
        assert found.body == b"{1}"
        assert one.process != two.process
        assert await one.lives(two.process)
        assert not await one.lives("somebody")
        for number in range(20):
            await (one, two)[number % 2].put(record(f"r{number}", "you", created=1000.0 + number))
        assert len(await one.list("response", "you", 100)) == 9, "the limits hold of all together"
        await with_state(two, record("large"), bytes(8000))
        found = await one.get("response", "a", "me")
        assert found is not None
        assert found.state is None, "one makes room for the other"
        assert await two.delete("response", "a", "me")
        assert await one.get("response", "a", "me") is None
        assert await one.get("response", "resp_\0", "me") is None
        stored = fsspec.filesystem("memory")
        await asyncio.to_thread(eventually, lambda: len(stored.ls("/machines/states")) == 1)
        assert one.failures == two.failures == {}


async def test_all_that_was_acknowledged_is_there_after_every_kill(database: str, tmp_path: Path) -> None:
    """With the files in a folder that is shared."""
    kills = Kills(tmp_path, encrypted=True, random=random.Random(0), url=database)
    for number in range(2):
        await kills.once(number)
    assert kills.wrong == []
    assert len(kills.said["state"]) > 3


async def test_a_file_whose_process_was_killed_goes_when_nobody_expects_it(settings: Settings, tmp_path: Path) -> None:
    clock = Clock()
    async with opened(settings, clock) as store:
        new = store.new_state()
        store._database.announce(new.id, clock())
        new.path.write_bytes(b"state")
        store._files.upload(new.id)
        await store.tidy()
        assert len(files(tmp_path / "states")) == 1
        clock.now += UPLOAD_SECONDS
        await store.put(record("a"))
        with pytest.raises(FileNotFoundError):  # the file is gone from where it was written
            store._files.prepare(new.id)
        await store.tidy()
        await left(tmp_path / "states", 0)
        new.path.write_bytes(b"state")
        with pytest.raises(StoreFailed, match="too long"):
            await store._query("adopt", store._database.adopt, new.id, 5, ("response", "a", "me"), clock())


@pytest.mark.parametrize("how", ["hangs", "has ended"])
async def test_a_database_that_is_away_fails_at_once_and_comes_back_by_itself(
    settings: Settings, postgresql: Postgresql, how: str
) -> None:
    async with opened(settings, timeout_seconds=SHORT) as store:
        await store.put(record("before"))
        if how == "hangs":
            postgresql.freeze()
        else:
            postgresql.stop()
        try:
            several = [store.put(record(str(number))) for number in range(8)]
            refused = await asyncio.gather(*several, return_exceptions=True)
            assert [type(each) for each in refused] == [Unreachable] * 8
            circuit = store._calls.database.circuit
            assert circuit is not None
            assert circuit.is_open
            with pytest.raises(Unreachable):  # nobody is asked
                await store.get("response", "before", "me")
            assert store.failures == {"put": 8, "get": 1}
        finally:
            if how == "hangs":
                postgresql.thaw()
            else:
                postgresql.start()
        await until(lambda: store.put(record("after")))
        assert await store.get("response", "before", "me") is not None


async def test_a_process_that_is_stopped_in_a_transaction_does_not_keep_others_from_writing(
    settings: Settings, postgresql: Postgresql
) -> None:
    async with opened(settings, timeout_seconds=SHORT) as store, opened(settings, timeout_seconds=SHORT) as stopped:
        connection = stopped._database._driver.writing.connect()
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1  # which has taken the lock
        with pytest.raises(Unreachable):
            await store.put(record("a"))
        await until(lambda: store.put(record("a")))
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("SELECT 1")
        connection.close()
    with postgresql.connect() as found:
        assert found.execute("SELECT pg_try_advisory_lock(%s)", [WRITE_LOCK]).fetchone() == (True,)


async def test_an_object_store_that_is_away_fails_at_once_and_comes_back_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SQLite."""
    async with opened({"path": tmp_path, "states_url": "unsteady://states"}) as store:
        of = await with_state(store, record("a"), b"state")
        await with_state(store, record("b"), b"other")
        monkeypatch.setattr(Unsteady, "fails", True)
        with pytest.raises(Unreachable):
            await store.state_file(of)
        new = store.new_state()
        new.path.write_bytes(b"new")
        with pytest.raises(Unreachable):
            await store.adopt(new.id, of)
        assert await store.delete("response", "b", "me"), "records do not depend on it"
        assert store.failures["read"] == store.failures["adopt"] == 1
        monkeypatch.setattr(Unsteady, "fails", False)
        await until(lambda: store.state_file(of))
        assert await content(store, of) == b"state"
    assert not files(tmp_path / "work")


async def test_a_circuit_lets_nothing_through_until_a_probe_succeeds() -> None:
    outcomes = [True, False]

    async def probe() -> None:
        if outcomes.pop(0):
            raise StoreFailed("not yet")

    circuit = Circuit("It", (OSError,), probe, seconds=0)
    circuit.check()
    circuit.open("a problem")
    circuit.open("another")
    with pytest.raises(Unreachable, match="It cannot be reached"):
        circuit.check()
    await until(lambda: asyncio.to_thread(circuit.check))
    assert outcomes == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["store.url=mysql://host/name"], r"store\.url"),
        (
            ["store.url=postgresql://u:secret@127.0.0.1:1/name", "store.path={path}"],
            r"store\.url: postgresql://\*\*\*@",
        ),
        (["store.url=postgresql://u:secret@[/name", "store.path={path}"], r"store\.url"),
        (["store.url=postgresql://127.0.0.1:1/name"], r"store\.path: with store\.url, states need"),
        (["store.states_url=memory://x"], r"store\.states_url: without store\.url and store\.path"),
        (["store.states_url=states", "store.path={path}"], r"store\.states_url"),
        (["store.states_url=nothing://secret@x", "store.path={path}"], r"store\.states_url: nothing://\*\*\*@x"),
        (["store.states_url=unsteady://x", "store.path={path}"], r"store\.states_url: unsteady://x cannot be used"),
        (["store.timeout_seconds=0"], r"store\.timeout_seconds"),
    ],
)
def test_what_cannot_be_opened_is_named_without_its_secrets(
    options: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unsteady, "fails", True)
    given = [(each.partition("=")[0], each.partition("=")[2].format(path=tmp_path)) for each in options]
    with pytest.raises(ConfigError, match=named) as refused:
        open_store(load(None, given).settings.store)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("missing", "option", "url", "extra"),
    [
        ("psycopg", "url", "postgresql://127.0.0.1:1/x", "shared-store"),
        ("fsspec", "states_url", "memory://x", "shared-store"),
        ("fsspec", "states_url", "s3://x", "s3"),
    ],
)
def test_a_missing_package_is_named(
    missing: str, option: str, url: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    given: Settings = {option: url}
    with pytest.raises(ConfigError, match=rf"^store\.{option}: .*pip install 'bdh-batch\[{extra}\]'$"):
        open_store(Chosen(path=tmp_path, **given))


class Machines:
    """Two servers that share no folder."""

    def __init__(self, one: Server, two: Server) -> None:
        self.both = one, two

    def ask(self, number: int, method: str, path: str = "", **body: Any) -> dict[str, Any]:
        url = f"/v1/responses{path}"
        response = self.both[number].http.request(method, url, json=body or None)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


def test_responses_go_on_at_another_server_and_come_also_where_they_cannot_be_stored(
    serve: ServeFactory, postgresql: Postgresql, database: str, tmp_path: Path
) -> None:
    shared = [f"store.url={database}", f"store.states_url=file://{tmp_path}/states", "store.timeout_seconds=3"]
    tiny = CONFORMANCE / "tiny"
    with serve(*shared, model=tiny) as one, serve(*shared, f"store.path={tmp_path}/two", model=tiny) as two:
        machines = Machines(one, two)
        first = machines.ask(0, "POST", input="Who is there?", max_output_tokens=8)
        path = f"/{first['id']}"
        one.until(lambda metrics: metrics["bdh_store_states"] >= 1)
        assert machines.ask(1, "GET", path) == first
        second = machines.ask(1, "POST", input="Speak!", previous_response_id=first["id"], max_output_tokens=2)
        assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0, "it begins in the state of the other one"
        listed = machines.ask(0, "GET")
        assert [each["id"] for each in listed["data"]] == [second["id"], first["id"]]
        endless = machines.ask(0, "POST", input="a", background=True, max_output_tokens=100_000, ignore_eos=True)
        path = f"/{endless['id']}"
        assert machines.ask(1, "GET", path)["status"] in ("queued", "in_progress")
        assert machines.ask(1, "POST", f"{path}/cancel")["status"] == "cancelled"
        one.until_idle()
        assert machines.ask(1, "DELETE", f"/{first['id']}")["deleted"]
        assert one.http.get(f"/v1/responses/{first['id']}").status_code == 404

        postgresql.freeze()
        try:
            for number in (0, 1, 0):
                away = machines.ask(number, "POST", input="Who is there?", max_output_tokens=8, seed=1)
                assert (away["status"], away["store"]) == ("incomplete", False)
            streamed = one.http.post("/v1/responses", json={"input": "a", "max_output_tokens": 4, "stream": True})
            last = json.loads(streamed.text.split("data: ")[-2].partition("\n")[0])
            assert (last["type"], last["response"]["store"]) == ("response.incomplete", False)
            refused = one.http.get(f"/v1/responses/{second['id']}")
            assert refused.status_code == 500
            assert "127.0.0.1" not in refused.text
            assert one.metrics()["bdh_store_failures_total{call=put}"] >= 3
        finally:
            postgresql.thaw()

        def stored() -> bool:
            return bool(machines.ask(0, "POST", input="a", max_output_tokens=2)["store"])

        eventually(stored)
        assert machines.ask(0, "GET", f"/{second['id']}")["id"] == second["id"]
        assert "responds again" in one.log
