"""When a front end accepts connections: beside others, only once it has its models."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from bdh_batch.http.gate import HostedModel
from bdh_batch.http.transport.server import bind
from bdh_batch.processes.children import Child, Role, may_accept_early
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.service import Service
from bdh_batch.settings import load
from tests.conftest import HANG_SECONDS


class Models:
    """Models that are loaded when a test says so."""

    def __init__(self) -> None:
        self.loading, self.go_on = asyncio.Event(), asyncio.Event()

    async def load(self) -> Sequence[HostedModel]:
        self.loading.set()
        await self.go_on.wait()
        return []

    async def drain(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


@pytest.mark.parametrize("early", [True, False])
async def test_connections_wait_in_the_kernel_until_the_models_are_loaded_unless_probes_need_a_reply(
    early: bool,
) -> None:
    listener = bind("127.0.0.1", 0)
    listener.setblocking(False)
    port, same = listener.getsockname()[1], listener.dup()
    models, ready = Models(), asyncio.Event()
    settings = load(overrides=[]).settings
    service = Service(settings, lambda *_: models, "m", lambda *_: ready.set(), [listener], early)
    url = f"http://127.0.0.1:{port}"
    async with asyncio.timeout(HANG_SECONDS), httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS) as http:
        running = asyncio.create_task(service.run())
        await models.loading.wait()
        if early:
            assert (await http.get("/readyz")).status_code == 503
            assert (await http.get("/livez")).status_code == 200
        else:
            with socket.create_connection(("127.0.0.1", port)):
                await asyncio.sleep(0)  # whoever accepts has had its turn
                select.select([same], [], [], HANG_SECONDS)
                taken, _ = same.accept()  # it is still there for another front end
                taken.close()
        assert not ready.is_set()
        models.go_on.set()
        await ready.wait()
        assert (await http.get("/livez")).status_code == 200
        service.stop()
        await running
    same.close()


def test_one_front_end_accepts_early_where_no_other_does() -> None:
    folder = RuntimeFolder(Path("none"))
    first, second = (Child(Role("front", number), f"front-{number}", folder) for number in range(2))
    engine = Child(Role("engine", 0), "engine-0", folder)
    engine.ready.set()
    children = [first, second, engine]
    assert may_accept_early(first, children)
    assert not may_accept_early(engine, children)
    first.accepts_early = True
    assert not may_accept_early(second, children)
    first.accepts_early = False  # it has died
    assert may_accept_early(second, children)
    second.ready.set()
    assert not may_accept_early(first, children)
