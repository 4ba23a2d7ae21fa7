"""States in S3, over its protocol: what servers share there, and what becomes of it where the store fails."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'bdh-batch[s3]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[s3]'")

from bdh_batch.errors import ConfigError
from bdh_batch.settings import Store as Chosen
from bdh_batch.store import database
from bdh_batch.store.circuit import Unreachable
from bdh_batch.store.database import UPLOAD_SECONDS
from bdh_batch.store.kept_files import KeptObjects, ObjectStoreFailed
from bdh_batch.store.opening import open_store
from bdh_batch.store.records import Store
from benchmarks.stress.store_kills import content
from tests.conftest import CONFORMANCE, HANG_SECONDS, ServeFactory, Server, eventually, free_port
from tests.store.objects import ObjectServer
from tests.store.test_store import KEY, Clock, Settings, files, left, opened, record, with_state

SHORT = 0.2  # seconds that a call may take which gets no response
STATE = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def objects() -> Iterator[ObjectServer]:
    server = ObjectServer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def settings(objects: ObjectServer, tmp_path: Path) -> Settings:
    """A store with an empty bucket. Calls that get a response may take long: the machine may be busy."""
    objects.empty()
    return {"path": tmp_path, "states_url": "s3://states/of/bdh", "timeout_seconds": 60.0}


def short(store: Store, patch: pytest.MonkeyPatch) -> None:
    """From now on, calls of the object store may take less time."""
    patch.setattr(store._calls.kept, "_seconds", SHORT)


async def recovered(store: Store) -> None:
    circuit = store._calls.kept.circuit
    assert circuit is not None
    await asyncio.to_thread(eventually, lambda: not circuit.is_open)


async def test_what_one_writes_another_reads_and_all_of_it_goes(
    settings: Settings, objects: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encrypted. Files that were uploaded by a process that was killed then go, too."""
    monkeypatch.setattr(database, "REMOVED_AT_ONCE", 2)
    clock = Clock()
    async with opened(settings, clock, encryption_key=KEY) as one, opened(settings, clock, encryption_key=KEY) as two:
        assert objects.names() == []  # a probe leaves nothing
        stored = [await with_state(one, record(f"r{number}"), STATE) for number in range(5)]
        assert objects.names() == sorted(f"of/bdh/{each.state}.sealed" for each in stored)
        assert await two.get("response", "r0", "me") == stored[0]
        assert await content(two, stored[0]) == STATE

        killed = one.new_state()
        killed.path.write_bytes(STATE)
        one._files.prepare(killed.id)
        one._database.announce(killed.id, clock())
        one._files.upload(killed.id)
        await two.tidy()
        assert len(objects.names()) == 6
        clock.now += UPLOAD_SECONDS
        await two.tidy()
        for each in stored:
            assert await two.delete("response", each.id, "me")
        await asyncio.to_thread(eventually, lambda: objects.names() == [])
        assert await content(one, stored[0]) is None
        assert one.failures == two.failures == {}


@pytest.mark.parametrize(
    ("url", "environment", "said"),
    [
        ("s3://nothing/states", {}, "FileNotFoundError"),
        ("s3://states", {"AWS_SECRET_ACCESS_KEY": "another"}, "PermissionError"),
        ("s3://states", {"AWS_ACCESS_KEY_ID": "AKIAnobody"}, "PermissionError"),
        ("s3://states", {"AWS_ENDPOINT_URL": "http://127.0.0.1:{free}"}, "EndpointConnectionError"),
    ],
    ids=["no bucket", "wrong secret", "wrong key", "refused"],
)
def test_what_cannot_be_written_is_refused_at_the_start(
    url: str,
    environment: dict[str, str],
    said: str,
    objects: ObjectServer,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(free=free_port()))
    with objects.checking(), pytest.raises(ConfigError, match=rf"^store\.states_url: {url} .*{said}") as refused:
        open_store(Chosen(**{**settings, "states_url": url}))
    assert objects.secret not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_store_that_says_nothing_is_refused_at_the_start(settings: Settings, objects: ObjectServer) -> None:
    with objects.holding("responses"), pytest.raises(ConfigError, match=r"cannot be used .*Timeout"):
        open_store(Chosen(**{**settings, "timeout_seconds": 0.1}))


@pytest.mark.parametrize("how", ["refuses", "says nothing", "has no bucket", "refuses the key"])
async def test_records_do_not_depend_on_it_and_it_comes_back_by_itself(
    how: str, settings: Settings, objects: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(settings) as store:
        of, other = [await with_state(store, record(id), STATE) for id in "ab"]
        with monkeypatch.context() as patch, objects.failing(how):
            if how == "says nothing":
                short(store, patch)
            if how == "has no bucket":  # which could be taken for a file that is not there
                assert await store.delete("response", "b", "me")
                await asyncio.to_thread(eventually, lambda: store.failures["remove"] == 1)
            new = store.new_state()
            new.path.write_bytes(STATE)
            with pytest.raises(Unreachable):
                await store.adopt(new.id, of)
            with pytest.raises(Unreachable):  # nobody is asked
                await store.state_file(of)
            assert await store.delete("response", "b", "me") == (how != "has no bucket")
            await store.put(record("c"))
            assert await store.get("response", "c", "me") is not None
            assert store.failures["read"] == store.failures["adopt"] == 1
            for _ in range(3):
                another = store.new_state()
                another.path.write_bytes(STATE)
                with pytest.raises(Unreachable):
                    await store.adopt(another.id, of)
            with store._database._driver.reading.connect() as connection:
                announced = connection.exec_driver_sql("SELECT count(*) FROM coming").scalar()
            assert announced == (how != "has no bucket"), "what cannot come is not announced"
        await recovered(store)
        assert await content(store, of) == STATE
        await with_state(store, record("c"), STATE)
        await left(tmp_path / "work", 0)
    async with opened(settings) as store:  # which removes what could not be
        await store.tidy()
        await asyncio.to_thread(eventually, lambda: not any(str(other.state) in each for each in objects.names()))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_what_is_wrong_is_told_apart(objects: ObjectServer, settings: Settings, tmp_path: Path) -> None:
    """An object that is gone, a bucket that is gone, and a full disk of this machine."""
    kept = KeptObjects(settings["states_url"], HANG_SECONDS, HANG_SECONDS)
    (tmp_path / "file").write_bytes(STATE)
    kept.upload(tmp_path / "file", "file")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as failed:
        kept.fetch("file", Path("/dev/full"))
    assert not isinstance(failed.value, ObjectStoreFailed)
    with objects.failing("has no bucket"):
        with pytest.raises(ObjectStoreFailed, match="bucket"):
            kept.fetch("file", tmp_path / "to")
        with pytest.raises(ObjectStoreFailed, match="bucket"):
            kept.remove("file")
    for _ in range(2):
        kept.remove("file")
    with pytest.raises(FileNotFoundError):
        kept.fetch("file", tmp_path / "to")
    assert objects.names() == []


async def test_a_slow_read_is_cut_off_harms_nothing_else_and_leaves_nothing(
    settings: Settings, objects: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(settings) as store:
        of = await with_state(store, record("a"), STATE)
        with objects.holding("bodies"):
            reading = asyncio.create_task(store.state_file(of))
            await asyncio.to_thread(objects.held.wait, HANG_SECONDS)
            await store.put(record("b"))  # meanwhile
            assert not reading.done()
            reading.cancel()  # as by a client that leaves
            with pytest.raises(asyncio.CancelledError):
                await reading
        await left(tmp_path / "work", 0)
        assert store.failures == {}

        with monkeypatch.context() as patch, objects.holding("bodies"):
            patch.setattr(store._files._kept, "_seconds", SHORT)  # the server holds it for longer
            with pytest.raises(Unreachable):
                await store.state_file(of)
            assert not files(tmp_path / "work")
        await recovered(store)
        with monkeypatch.context() as patch, objects.holding("bodies"):
            short(store, patch)
            with pytest.raises(Unreachable):
                await store.state_file(of)
        await left(tmp_path / "work", 0)  # though it came at last
        await recovered(store)
        assert await content(store, of) == STATE


def ask(server: Server, method: str, path: str = "/v1/responses", **body: Any) -> dict[str, Any]:
    response = server.http.request(method, path, json=body or None)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_conversation_goes_on_at_another_server_and_while_the_store_is_away(
    serve: ServeFactory, settings: Settings, objects: ObjectServer
) -> None:
    options = [*(f"store.{name}={value}" for name, value in settings.items()), "prefix_cache.enabled=false"]
    with (
        serve(*options, model=CONFORMANCE / "tiny", env=objects.environment) as one,
        serve(*options, model=CONFORMANCE / "tiny", env=objects.environment) as two,
    ):
        first = ask(one, "POST", input="Who is there?", max_output_tokens=8)
        one.until(lambda metrics: metrics["bdh_store_states"] >= 1)
        again = {"input": "Speak!", "previous_response_id": first["id"], "max_output_tokens": 8, "seed": 1}
        second = ask(two, "POST", **again)
        assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0, "it begins in the state of the other one"
        saved = ask(one, "POST", "/v1/states", prompt="Nay, answer me.", model="tiny")
        with objects.failing("refuses"):
            third = ask(two, "POST", **again)
            assert third["output"][0]["content"] == second["output"][0]["content"]
            assert third["store"], "the record has what its state can be computed from"
            assert third["usage"]["input_tokens_details"]["cached_tokens"] == 0
            assert two.http.post("/v1/states", json={"prompt": "Stand!", "model": "tiny"}).status_code == 500
            whole = two.complete(prompt=" Long live the king!", state=saved["id"], max_tokens=4, seed=1)
            assert two.metrics()["bdh_store_failures_total{call=read}"] >= 1
        eventually(lambda: "responds again" in two.log)
        begun = two.complete(prompt=" Long live the king!", state=saved["id"], max_tokens=4, seed=1)
        assert begun["choices"] == whole["choices"]
        assert ask(two, "POST", "/v1/states", prompt="Stand!", model="tiny")["bytes"] > 0
