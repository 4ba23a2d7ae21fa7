"""The store of records and states: what was acknowledged is there, within its limits, whatever happens."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from bdh_batch.errors import ConfigError, StoreFailed, StoreFull
from bdh_batch.settings import Store as Chosen
from bdh_batch.store.opening import open_store
from bdh_batch.store.records import Record, Store
from bdh_batch.store.sealing import FRAME, SealingFailed, sealer_of
from bdh_batch.store.sqlite import LARGEST_LOG
from bdh_batch.store.temporary import TEMPORARY, temporary_folder
from benchmarks.stress.store_kills import Kills, content
from tests.conftest import HANG_SECONDS, eventually

Settings = dict[str, Any]
KEY = base64.b64encode(bytes(range(32))).decode()
SECRET = b"wherefore art thou Romeo"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Where the store is, as settings have it. Tests that take it hold for any (`test_shared_store.py`)."""
    return {"path": tmp_path}


@contextlib.asynccontextmanager
async def opened(
    settings: Path | Settings | None, clock: Callable[[], float] | None = None, **options: Any
) -> AsyncIterator[Store]:
    chosen = settings if isinstance(settings, dict) else {"path": settings}
    store = open_store(Chosen(**chosen, **options), clock or Clock())
    try:
        yield store
    finally:
        await store.close()


def record(id: str, owner: str = "me", **fields: Any) -> Record:
    return Record(id, fields.pop("kind", "response"), owner, fields.pop("created", 1000.0), **fields)


async def with_state(store: Store, of: Record, content: bytes) -> Record:
    """Puts a record and a file as its state."""
    await store.put(of)
    new = store.new_state()
    new.path.write_bytes(content)
    assert await store.adopt(new.id, of)
    found = await store.get(of.kind, of.id, of.owner)
    assert found is not None
    return found


def damage(path: Path, *ids: str) -> None:
    """Overwrites the bodies of records."""
    with contextlib.closing(sqlite3.connect(path / "records.sqlite3")) as database, database:
        database.executemany("UPDATE records SET body = X'00' WHERE id = ?", [(id,) for id in ids])


def files(path: Path) -> list[Path]:
    return [each for each in path.rglob("*") if each.is_file()]


async def left(path: Path, count: int) -> None:
    """Until so many files are left in a folder: those that are gone are removed a moment later."""
    await asyncio.to_thread(eventually, lambda: len(files(path)) == count)


@pytest.mark.parametrize("key", [None, KEY])
async def test_what_was_put_is_there_after_a_restart(settings: Settings, key: str | None) -> None:
    state = os.urandom(FRAME + 5)
    async with opened(settings, encryption_key=key) as store:
        put = record("a", parent="b", body=b'{"x":1}', tokens=b"\1\0\0\0", expires=5000.0)
        kept = await with_state(store, put, state)
    async with opened(settings, encryption_key=key) as store:
        found = await store.get("response", "a", "me")
        assert found == kept
        assert found.state is not None
        assert (found.body, found.tokens, found.parent, found.expires) == (b'{"x":1}', b"\1\0\0\0", "b", 5000.0)
        assert await content(store, found) == state


async def test_the_latest_are_those_whose_states_were_used_last_and_to_peek_is_no_use(settings: Settings) -> None:
    clock = Clock()
    async with opened(settings, clock) as store:
        kept: dict[str, dict[str, Any]] = {
            "first": {},
            "parent": {},
            "child": {"parent": "parent"},
            "expired": {"expires": 2000.0},
            "other": {"owner": "you"},
            "of another kind": {"kind": "state"},
        }
        for id, fields in kept.items():
            await with_state(store, record(id, **fields), b"state")
        await store.put(record("without a state"))
        clock.now = 2000.0
        assert await store.get("response", "first", "me") is not None
        assert await store.peek("response", "child", "you") is None
        assert await store.peek("response", "child", "me") == await store.get("response", "child", "me")
        assert await store.get("response", "other", "you") is not None
        assert await store.peek("response", "first", "me") is not None
        await store.put(record("another one"))  # what was used is noted with the next write
        expected = [("other", "you"), ("child", "me"), ("first", "me")]
        assert await store.latest("response", 10) == expected
        assert await store.latest("response", 2) == expected[:2]


async def test_nobody_else_finds_changes_or_deletes_a_record(settings: Settings) -> None:
    async with opened(settings) as store:
        await store.put(record("a", body=b"1"))
        assert await store.get("response", "a", "you") is None
        assert await store.get("state", "a", "me") is None
        assert not await store.delete("response", "a", "you")
        assert await store.list("response", "you", 10) == []
        with pytest.raises(StoreFailed):
            await store.put(record("a", "you", body=b"2"))
        found = await store.get("response", "a", "me")
        assert found is not None
        assert found.body == b"1"
        assert store.failures == {"put": 1}


async def test_what_has_expired_is_not_found_and_its_file_goes(settings: Settings, tmp_path: Path) -> None:
    clock = Clock()
    async with opened(settings, clock) as store:
        of = await with_state(store, record("a", expires=2000.0), b"state")
        await store.put(record("b"))
        clock.now = 2000.0
        assert await store.get("response", "a", "me") is None
        assert [each.id for each in await store.list("response", "me", 10)] == ["b"]
        await store.tidy()
        assert store.evictions == {"expired": 1}
        await left(tmp_path / "states", 0)
        assert await content(store, of) is None


async def test_a_record_that_does_not_say_expires_by_the_setting(settings: Settings) -> None:
    clock = Clock()
    async with opened(settings, clock, ttl_seconds=50) as store:
        await store.put(record("a", created=1000.0))
        clock.now = 1049.0
        assert await store.get("response", "a", "me") is not None
        clock.now = 1050.0
        assert await store.get("response", "a", "me") is None


async def test_lists_go_from_the_newest_on(settings: Settings) -> None:
    async with opened(settings) as store:
        for number in range(5):
            await store.put(record(f"r{number}", created=1000.0 + number // 2, tokens=b"1234"))
        first = await store.list("response", "me", 2)
        assert [each.id for each in first] == ["r4", "r3"]
        assert [each.tokens for each in first] == [b"", b""]
        assert [each.id for each in await store.list("response", "me", 10, "r3")] == ["r2", "r1", "r0"]
        assert await store.list("response", "me", 10, "none") == []


async def test_ten_thousand_conversations_go_through_a_store_of_a_hundred() -> None:
    async with opened(None, max_records=100) as store:
        for number in range(0, 10_000, 50):
            await asyncio.gather(
                *(store.put(record(f"r{each}", tokens=bytes(400))) for each in range(number, number + 50)),
                store.get("response", "r7", "me"),
            )
        assert store.held()["records"] == 100
        assert store.evictions["record"] == 9_900
        assert len(await store.list("response", "me", 1000)) == 100
        assert await store.get("response", "r7", "me") is not None, "what is used stays"
        assert await store.get("response", "r9999", "me") is not None


async def test_states_go_before_records_and_the_least_recently_used_first(settings: Settings, tmp_path: Path) -> None:
    async with opened(settings, max_bytes=10_000) as store:
        one = await with_state(store, record("a"), bytes(3000))
        await with_state(store, record("b"), bytes(3000))
        assert await store.get("response", "a", "me") == one
        await with_state(store, record("c"), bytes(4000))
        kept = [await store.get("response", id, "me") for id in "abc"]
        assert [each is not None and each.state is not None for each in kept] == [True, False, True]
        assert store.evictions["state"] == 1
        await left(tmp_path / "states", 2)


async def test_room_is_made_by_who_has_most(settings: Settings) -> None:
    async with opened(settings, max_records=10) as store:
        await store.put(record("mine"))
        for number in range(50):
            await store.put(record(f"r{number}", "you"))
        assert await store.get("response", "mine", "me") is not None


async def test_a_callers_own_limit_leaves_others_alone(settings: Settings, tmp_path: Path) -> None:
    async with opened(settings, max_bytes_per_key=5_000) as store:
        await with_state(store, record("mine"), bytes(4000))
        for number in range(50):
            await store.put(record(f"r{number}", "you", tokens=bytes(400)))
        mine = await store.get("response", "mine", "me")
        assert mine is not None
        assert mine.state is not None
        assert 0 < len(await store.list("response", "you", 100)) < 10
        of = record("large", "you")
        await store.put(of)
        new = store.new_state()
        new.path.write_bytes(bytes(6000))
        with pytest.raises(StoreFull, match="max_bytes_per_key"):
            await store.adopt(new.id, of)
        kept = await store.get("response", "large", "you")
        assert kept is not None
        assert kept.state is None
        with pytest.raises(StoreFull):
            await store.put(record("larger", "you", body=bytes(6000)))
        await left(tmp_path / "states", 1)


async def test_records_share_a_state_which_goes_with_the_last_one(settings: Settings, tmp_path: Path) -> None:
    async with opened(settings) as store:
        of = await with_state(store, record("a"), b"state")
        await store.put(record("s", kind="state", state=of.state))
        await store.delete("response", "a", "me")
        saved = await store.get("state", "s", "me")
        assert saved is not None
        assert await content(store, saved) == b"state"
        await store.put(record("other", "you", state=of.state))
        other = await store.get("response", "other", "you")
        assert other is not None
        assert other.state is None, "a state is its owner's"
        await store.delete("state", "s", "me")
        await left(tmp_path / "states", 0)


async def test_a_state_that_is_deleted_stays_readable_to_who_uses_it(settings: Settings, tmp_path: Path) -> None:
    async with opened(settings) as store:
        of = await with_state(store, record("a"), b"state")
        used = [await store.state_file(of) for _ in range(3)]
        assert await store.delete("response", "a", "me")
        await left(tmp_path / "states", 0)
        assert [file is not None and file.path.read_bytes() for file in used] == [b"state"] * 3
        assert await store.state_file(of) is None
        for file in used:
            assert file is not None
            file.close()
            file.close()
    assert not files(tmp_path / "work")


async def test_deleting_while_it_is_adopted_leaves_no_file(settings: Settings, tmp_path: Path) -> None:
    async with opened(settings) as store:
        for number in range(20):
            of = record(f"r{number}")
            await store.put(of)
            new = store.new_state()
            new.path.write_bytes(b"state")
            await asyncio.gather(store.adopt(new.id, of), store.delete(of.kind, of.id, of.owner))
        assert store.held() == {"records": 0, "states": 0, "bytes": 0}
        await left(tmp_path / "states", 0)
    assert not files(tmp_path / "work")


async def test_orphans_and_lost_files_are_cleaned_up_at_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        of = await with_state(store, record("a"), b"state")
        assert of.state is not None
    (tmp_path / "states" / f"{of.state}.safetensors").unlink()
    (tmp_path / "states" / "orphan.safetensors").write_bytes(b"x")
    left = tmp_path / "work" / "killed"
    left.mkdir()
    (left / "partial").write_bytes(b"x")
    async with opened(tmp_path) as store:
        found = await store.get("response", "a", "me")
        assert found is not None
        assert found.state is None
    assert not files(tmp_path / "states") + files(tmp_path / "work")


async def test_a_file_whose_writer_leaves_before_it_is_there_is_closed_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes = threading.Event(), threading.Event()
    made: list[BinaryIO] = []

    async def pieces() -> AsyncIterator[bytes]:
        yield b"state"

    async with opened(tmp_path) as store:
        begin = store._files.begin

        def begin_late(id: str) -> BinaryIO:
            begun.set()
            goes.wait(HANG_SECONDS)
            made.append(begin(id))
            return made[0]

        monkeypatch.setattr(store._files, "begin", begin_late)
        new = store.new_state()
        writing = asyncio.create_task(store.write(new, pieces()))
        await asyncio.to_thread(begun.wait, HANG_SECONDS)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        store.discard(new.id)  # as its writer does
        goes.set()
        await asyncio.to_thread(eventually, lambda: len(made) == 1 and made[0].closed)
        await left(tmp_path / "work", 0)


async def test_two_servers_share_a_store(settings: Settings) -> None:
    async with opened(settings) as one, opened(settings) as two:
        of = await with_state(one, record("a"), b"state")
        async with opened(settings):
            assert await content(two, of) == b"state", "a start removes nothing of those that run"
        await asyncio.gather(*(store.put(record(f"{n}{id(store)}")) for n in range(20) for store in (one, two)))
        assert len(await one.list("response", "me", 100)) == 41


async def test_what_was_deleted_is_not_updated(settings: Settings) -> None:
    async with opened(settings) as store:
        await with_state(store, record("a"), b"state")
        assert await store.update(record("a", body=b"{1}", tokens=b"1234"))
        found = await store.get("response", "a", "me")
        assert found is not None
        assert (found.body, found.tokens, await content(store, found)) == (b"{1}", b"1234", b"state")
        assert not await store.update(record("a", owner="somebody"))
        await store.delete("response", "a", "me")
        assert not await store.update(record("a"))
        assert await store.get("response", "a", "me") is None


async def test_whether_a_process_lives_is_known_to_others(settings: Settings) -> None:
    async with opened(settings) as one:
        async with opened(settings) as other:
            name = other.process
            assert await one.lives(name)
            assert await one.lives(one.process)
        assert not await one.lives(name)


async def test_nothing_encrypted_lies_in_plain(tmp_path: Path) -> None:
    async with opened(tmp_path, encryption_key=KEY) as store:
        await with_state(store, record("a", body=SECRET, tokens=SECRET), SECRET * (FRAME // 8))
        on_disk = [path.read_bytes() for path in files(tmp_path)]
        assert len(on_disk) > 2
        assert not any(SECRET in each for each in on_disk)


@pytest.mark.parametrize("key", [None, base64.b64encode(bytes(32)).decode()])
async def test_another_key_is_refused_at_start(settings: Settings, key: str | None) -> None:
    async with opened(settings, encryption_key=KEY):
        pass
    with pytest.raises(ConfigError, match=r"store\.encryption_key"):
        open_store(Chosen(**settings, encryption_key=key))
    async with opened(settings, encryption_key=KEY):
        pass


@pytest.mark.parametrize("key", ["", "short", "é" * 44, "A" * 43, "0" * 63])
def test_what_is_no_key_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="32 bytes in base64"):
        sealer_of(key)
    (tmp_path / "key").write_text(key)
    with pytest.raises(ConfigError, match="32 bytes in base64"):
        open_store(Chosen(path=tmp_path / "store", encryption_key_file=tmp_path / "key"))


@pytest.mark.parametrize("size", [0, 1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME])
def test_files_are_encrypted_in_frames(tmp_path: Path, size: int) -> None:
    plain, sealed, sealer = tmp_path / "plain", tmp_path / "sealed", sealer_of(KEY)
    plain.write_bytes(os.urandom(size))
    with plain.open("rb") as source, sealed.open("wb") as target:
        sealer.seal_file(source, target, b"id")

    def read(label: bytes = b"id") -> bytes:
        with sealed.open("rb") as file:
            return b"".join(sealer.open_file(file, label))

    assert read() == plain.read_bytes()
    with pytest.raises(SealingFailed):
        read(b"other")
    whole = sealed.read_bytes()
    for cut in {10, len(whole) - 1, len(whole) - 16, len(whole) - FRAME - 16} - {len(whole)}:
        if cut > 0:
            sealed.write_bytes(whole[:cut])
            with pytest.raises(SealingFailed):
                read()
    sealed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SealingFailed):
        read()


async def test_a_damaged_state_is_counted_and_removed_and_harms_nothing_else(
    settings: Settings, tmp_path: Path
) -> None:
    async with opened(settings, encryption_key=KEY) as store:
        of = await with_state(store, record("a", body=b"1"), b"state")
        [file] = files(tmp_path / "states")
        file.write_bytes(file.read_bytes()[:-3])
        assert await store.state_file(of) is None
        found = await store.get("response", "a", "me")
        assert found is not None
        assert (found.body, found.state) == (b"1", None)
        assert store.failures == {"read": 1, "damaged": 1}
        await left(tmp_path / "states", 0)


async def test_a_list_leaves_out_the_records_that_cannot_be_decrypted(tmp_path: Path) -> None:
    async with opened(tmp_path, encryption_key=KEY) as store:
        for number in range(7):
            await store.put(record(str(number), created=1000.0 + number))
        damage(tmp_path, "0", "3", "4", "6")
        for limit in range(1, 5):
            listed = await store.list("response", "me", limit)
            assert [each.id for each in listed] == ["5", "2", "1"][:limit]
            assert [each.id for each in await store.list("response", "me", limit, "5")] == ["2", "1"][:limit]
        assert store.failures["damaged"] > 4
        with pytest.raises(StoreFailed, match="damaged"):
            await store.get("response", "3", "me")


async def test_a_state_that_may_be_damaged_is_looked_at_and_removed_only_where_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for name in ("a", "b"):
            of = await with_state(store, record(name), name.encode())
            file = await store.state_file(of)
            assert file is not None
            for _ in range(3):
                store.examine(str(file.path), lambda path: "it is a" if path.read_bytes() == b"a" else None)
        await asyncio.to_thread(eventually, lambda: len(files(tmp_path / "states")) == 1)
        assert store.failures == {"damaged": 1}
        store.examine(str(tmp_path / "other.safetensors"), lambda path: "nobody asks")


async def test_a_damaged_database_ends_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put(record("a", body=bytes(20_000)))
    database = tmp_path / "records.sqlite3"
    database.write_bytes(b"no database at all" * 1000)
    with pytest.raises(ConfigError, match=r"store\.path"):
        open_store(Chosen(path=tmp_path))


async def test_only_its_user_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        async with opened(tmp_path / "store") as store:
            await with_state(store, record("a"), b"state")
            for path in [tmp_path / "store", *(tmp_path / "store").iterdir()]:
                assert path.stat().st_mode & 0o077 == 0, path
    finally:
        os.umask(before)


def test_a_folder_that_anybody_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match=r"store\.path.*any user"):
        open_store(Chosen(path=tmp_path))


async def test_the_disk_gets_back_what_is_not_used(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=2**30) as store:
        for number in range(50):
            await store.put(record(str(number), body=bytes(2**20)))
        log = tmp_path / "records.sqlite3-wal"
        assert log.stat().st_size <= LARGEST_LOG + 2**22
        for number in range(50):
            assert await store.delete("response", str(number), "me")
        for _ in range(4):
            await store.tidy()
        await store.put(record("a"))
    assert (tmp_path / "records.sqlite3").stat().st_size < 2**20


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "records.sqlite3")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer"):
        open_store(Chosen(path=tmp_path))


FULL_DISK = """
import asyncio, resource, signal, sys, time
from pathlib import Path
from bdh_batch.errors import StoreFailed
from bdh_batch.settings import Store as Chosen
from bdh_batch.store.opening import open_store
from bdh_batch.store.records import Record

async def main():
    store = open_store(Chosen(path=Path(sys.argv[1])))
    await store.put(Record("before", "response", "me", time.time()))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        await store.put(Record("large", "response", "me", time.time(), body=bytes(2**20)))
    except StoreFailed as error:
        print("failed", flush=True)
    assert await store.get("response", "before", "me") is not None
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await store.put(Record("after", "response", "me", time.time()))
    print(dict(store.failures), [each.id for each in await store.list("response", "me", 9)])
    await store.close()

asyncio.run(main())
"""


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_full_disk_fails_one_write_and_no_more(tmp_path: Path) -> None:
    said, _ = run(FULL_DISK, str(tmp_path)).communicate(timeout=300)
    assert said.splitlines() == ["failed", "{'put': 1} ['after', 'before']"]


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_store_opens_with_all_that_was_acknowledged_after_every_kill(tmp_path: Path, encrypted: bool) -> None:
    kills = Kills(tmp_path, encrypted, random.Random(encrypted))
    for number in range(5):
        await kills.once(number)
    assert kills.wrong == []
    assert len(kills.said["state"]) > 10


def test_the_temporary_folder_of_a_killed_server_is_removed_by_the_next() -> None:
    script = (
        "import sys; from bdh_batch.settings import Store; from bdh_batch.store.temporary import temporary_folder; "
    )
    script += "print(temporary_folder(Store()).path, flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    assert left.name.startswith(TEMPORARY)
    beside = temporary_folder(Chosen())
    assert left.is_dir(), "that of one that lives stays"
    process.kill()
    process.communicate(timeout=300)
    temporary_folder(Chosen()).remove()
    assert not left.exists()
    assert beside.path.is_dir()
    beside.remove()
