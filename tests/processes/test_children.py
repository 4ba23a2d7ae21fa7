"""A supervisor restarts processes that hang, and those that do not get ready."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from bdh_batch.processes import children
from bdh_batch.processes.children import Child, Children, Role
from bdh_batch.processes.folder import RuntimeFolder
from tests.conftest import HANG_SECONDS


@asynccontextmanager
async def engine(mode: str, changed: asyncio.Queue[Child]) -> AsyncGenerator[Child, None]:
    """An engine process of a supervisor; `changed` gets it when it is ready, and when it did not get ready."""
    folder = RuntimeFolder.make()
    all_of = Children(["tests.processes.idle_engine", mode], lambda _: {}, [], 0.0, 1.2, changed.put_nowait)
    try:
        async with asyncio.timeout(HANG_SECONDS):
            child = all_of.add(Role("engine", 0), "engine-0", folder)
            yield child
            all_of.kill()
            await all_of.end()
    finally:
        all_of.kill()
        folder.remove()


def pid_of(child: Child) -> int:
    assert child.process is not None
    return child.process.pid


async def test_an_engine_that_hangs_for_good_is_killed_and_restarted(caplog: pytest.LogCaptureFixture) -> None:
    changed: asyncio.Queue[Child] = asyncio.Queue()
    async with engine("well", changed) as child:
        await changed.get()
        os.kill(hung := pid_of(child), signal.SIGSTOP)
        await changed.get()
        while child.process is None or child.process.pid == hung:  # it was late before it was stopped
            await changed.get()
        assert child.ready.is_set()
    assert "engine-0 hangs" in caplog.text
    assert "ended (signal 9)" in caplog.text


async def test_an_engine_that_does_not_get_ready_is_killed_and_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "START_SECONDS", 0.2)
    caplog.set_level(logging.ERROR)
    changed: asyncio.Queue[Child] = asyncio.Queue()
    async with engine("mute", changed) as child:
        for _ in range(2):
            assert not (await changed.get()).ready.is_set()
            assert child.report is not None
            assert "signal 9" in str(child.report.problem)
    assert caplog.text.count("is not ready after 0 s and is killed") >= 2
