"""The sandbox: real processes, and jobs that do their worst."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from bdh_batch.errors import Unavailable
from bdh_batch.text.job_queue import QueueLimits
from bdh_batch.text.sandbox import JobFailed, Sandbox, Work
from bdh_batch.text.sandbox_process import JobLimits, Refused

WITHIN = 300.0  # seconds; nothing here takes long, but the machine may be busy
LIMITS = JobLimits(seconds=0.3, memory=64 * 2**20, stack=2**20, jobs=3, patience=12.0)  # the machine may be busy
STRANGERS = set[psutil.Process]()  # of servers that other tests keep in this process


async def said(said: bytes) -> bytes:
    return said


def opened(limits: JobLimits = LIMITS, setup: bytes = b"x") -> Sandbox:
    return Sandbox(Work("tests.text.jobs", setup, limits, "the.seconds", "the.memory"), QueueLimits())


@pytest.fixture(autouse=True)
def strangers() -> None:
    STRANGERS.clear()
    STRANGERS.update(psutil.Process().children())


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    one = opened()
    yield one
    one.close()


async def run(sandbox: Sandbox, job: str, tenant: str = "t") -> bytes:
    return await asyncio.wait_for(sandbox.run(job.encode(), tenant, said), WITHIN)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN):
        while not condition():  # noqa: ASYNC110 - of other processes there is no event
            await asyncio.sleep(0.01)


def running() -> list[psutil.Process]:
    """The warm process and its workers."""
    mine = set(psutil.Process().children()) - STRANGERS
    return [process for parent in mine for process in (parent, *parent.children())]


def test_what_the_preparation_reports_and_refuses_is_reported() -> None:
    ready = opened()
    assert ready.wait_until_ready() == b"ready: x"
    ready.close()
    ready.close()
    with pytest.raises(Refused, match="no such setup"):
        opened(setup=b"refuse").wait_until_ready()
    with pytest.raises(Refused, match="ended at its start"):
        opened(setup=b"die").wait_until_ready()


FAILING = [
    ("spin", "timeout", r"0\.3 s \(the\.seconds\)"),
    ("sleep 60", "timeout", r"the\.seconds"),
    ("hold 300000000", "memory", r"64 MiB \(the\.memory\)"),
    (f"signal {signal.SIGABRT:d}", "memory", r"the\.memory"),
    (f"signal {signal.SIGSEGV:d}", "crash", "crashed"),
    ("recurse", "crash", "crashed"),
    (f"signal {signal.SIGKILL:d}", "memory", r"the\.memory"),
]


async def test_each_end_of_a_job_is_reported_as_what_it_was_and_costs_the_next_one_nothing(sandbox: Sandbox) -> None:
    for job, outcome, text in FAILING:
        with pytest.raises(JobFailed, match=text) as failed:
            await run(sandbox, job)
        assert failed.value.outcome == outcome
        assert await run(sandbox, "echo é") == "é".encode()
    with pytest.raises(Refused, match="not this one"):
        await run(sandbox, "refuse not this one")
    outcomes = {"ok": 7, "refused": 1, "timeout": 2, "memory": 3, "crash": 2, "cancelled": 0}
    assert sandbox.load.outcomes == outcomes
    assert (sandbox.load.waiting, sandbox.load.running) == (0, 0)


async def test_a_bug_of_ours_is_logged(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(JobFailed):
        await run(sandbox, "bug")
    assert "a bug of ours" in caplog.text


async def test_it_warms_up_by_a_job_of_its_own(sandbox: Sandbox) -> None:
    sandbox.warm_up(b"pid")
    await eventually(lambda: len(running()) > 1)
    first = await run(sandbox, "pid")
    assert int(first) in [process.pid for process in running()]
    assert sum(sandbox.load.outcomes.values()) == 1  # its own does not count


async def test_jobs_and_results_may_be_large(sandbox: Sandbox) -> None:
    assert len(await run(sandbox, "echo " + "x" * 4_000_000)) == 4_000_000


async def test_a_worker_does_some_jobs_and_one_that_has_grown_is_replaced() -> None:
    sandbox = opened(JobLimits(seconds=WITHIN, memory=2**30, jobs=3))
    try:
        pids = [await run(sandbox, "pid") for _ in range(6)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3]
        first = await run(sandbox, "pid")
        await run(sandbox, "hold 100000000")
        assert await run(sandbox, "pid") != first
    finally:
        sandbox.close()


async def test_a_client_that_leaves_takes_its_job_with_it() -> None:
    sandbox = opened(JobLimits(seconds=WITHIN, memory=2**26))
    try:
        spinning = asyncio.ensure_future(run(sandbox, "spin"))
        waiting = asyncio.ensure_future(run(sandbox, "spin"))
        await eventually(lambda: (sandbox.load.running, sandbox.load.waiting) == (1, 1))
        assert await run(sandbox, "echo other", "another tenant") == b"other"
        waiting.cancel()
        await eventually(lambda: sandbox.load.waiting == 0)
        spinning.cancel()
        await eventually(lambda: sandbox.load.outcomes["cancelled"] == 1)
        assert await run(sandbox, "echo next") == b"next"
    finally:
        sandbox.close()


async def test_what_follows_a_job_belongs_to_its_turn(sandbox: Sandbox) -> None:
    inside = asyncio.Event()
    go_on = asyncio.Event()

    async def then(result: bytes) -> str:
        inside.set()
        await go_on.wait()
        return result.decode()

    working = asyncio.ensure_future(sandbox.run(b"echo a", "t", then))
    await inside.wait()
    assert sandbox.load.running == 1
    go_on.set()
    assert await working == "a"
    assert sandbox.load.running == 0


@pytest.mark.parametrize("which", [slice(0, 1), slice(1, None), slice(None)])
async def test_killed_by_a_stranger_it_goes_on(sandbox: Sandbox, which: slice) -> None:
    assert await run(sandbox, "echo a") == b"a"
    for process in running()[which]:
        process.kill()
    assert await run(sandbox, "echo b") == b"b"


async def test_a_job_whose_worker_is_killed_by_a_stranger_is_done_again() -> None:
    sandbox = opened(JobLimits(seconds=WITHIN, memory=2**26))
    try:
        assert await run(sandbox, "echo a") == b"a"
        working = asyncio.ensure_future(run(sandbox, "sleep 0.5"))
        await eventually(lambda: len(running()) > 1)
        running()[1].kill()
        assert await working == b"done"
    finally:
        sandbox.close()


async def test_closed_it_leaves_no_process_and_takes_no_job() -> None:
    sandbox = opened(JobLimits(seconds=WITHIN, memory=2**26))
    spinning = asyncio.ensure_future(run(sandbox, "spin"))
    await eventually(lambda: len(running()) > 1)
    processes = running()
    sandbox.close()
    with pytest.raises((Unavailable, JobFailed)):
        await spinning
    with pytest.raises(Unavailable):
        await run(sandbox, "echo a")
    await eventually(lambda: not any(map(psutil.Process.is_running, processes)))


async def test_it_ends_with_the_server_however_that_ends() -> None:
    code = (
        "import asyncio, sys\n"
        "from tests.text.test_sandbox import opened, run, JobLimits\n"
        "async def main():\n"
        "    sandbox = opened(JobLimits(seconds=60.0, memory=2**26))\n"
        "    await run(sandbox, 'echo a')\n"
        "    working = asyncio.ensure_future(run(sandbox, 'spin'))\n"
        "    await asyncio.sleep(0.1)\n"
        "    print('spinning', flush=True)\n"
        "    await working\n"
        "asyncio.run(main())\n"
    )
    here = Path(__file__).parents[2]
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=here)
    assert server.stdout is not None
    await server.stdout.readline()
    inside = psutil.Process(server.pid).children(recursive=True)
    assert inside
    server.kill()
    await server.wait()
    await eventually(lambda: not any(each.is_running() and each.status() != "zombie" for each in inside))


async def test_its_modules_are_found_where_the_servers_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text("from tests.text.jobs import prepare\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("BDH_AUTH__API_KEYS", "secret")
    sandbox = Sandbox(Work("elsewhere", b"there", LIMITS, "s", "m"), QueueLimits())
    assert sandbox.wait_until_ready() == b"ready: there"
    environment = running()[0].environ()
    sandbox.close()
    assert "secret" not in str(environment)
    assert os.environ["BDH_AUTH__API_KEYS"] == "secret"


@pytest.mark.parametrize(("parent", "code"), [(os.getpid, 0), (os.getppid, 1)], ids=["alive", "ended"])
def test_a_worker_whose_parent_ended_before_it_could_be_notified_ends(parent: Callable[[], int], code: int) -> None:
    boot = "import sys; from bdh_batch.text.sandbox_process import end_with_parent; end_with_parent(int(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", boot, str(parent())], timeout=WITHIN).returncode == code
