"""`make cluster-check`: what is lost on a cluster of Ray, what is scaled, and what cannot start.

It prints how long streams paused. Real processes on one machine; a second node is a second raylet.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.conftest import HANG_SECONDS, clean_environment, eventually, free_port
from tests.deploy.rays import ENVIRONMENT, Told, cluster

STREAMS, TOKENS = 32, 400
ONE_CORE = "engine.threads=1"


def texts(told: Sequence[Told]) -> list[str]:
    return [each.text for each in told]


def report(capsys: pytest.CaptureFixture[str], what: str, before: Sequence[Told], after: Sequence[Told]) -> None:
    with capsys.disabled():
        pauses = [max(each.pause for each in told) for told in (before, after)]
        print(f"\n{what}: longest pause {pauses[1]:.2f} s, undisturbed {pauses[0]:.2f} s")


async def test_engines_and_front_ends_are_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("engine.replicas=2", ONE_CORE, "server.workers=2", f"store.path={tmp_path / 'store'}")
    with cluster(tmp_path, *options) as server:
        await asyncio.to_thread(server.until_engines, 2)
        undisturbed = await server.streams(STREAMS, TOKENS)
        assert {each.finish_reason for each in undisturbed} == {"length"}

        moved = await server.streams(STREAMS, TOKENS, begun=lambda: server.kill_one("engine-0"))
        assert texts(moved) == texts(undisturbed)
        report(capsys, "an engine of two is killed", undisturbed, moved)
        await asyncio.to_thread(server.until_engines, 2)

        hung = await server.streams(STREAMS, TOKENS, begun=lambda: server.kill_one("engine-0", number=signal.SIGSTOP))
        assert texts(hung) == texts(undisturbed)
        report(capsys, "an engine of two hangs", undisturbed, hung)
        await asyncio.to_thread(server.until_engines, 2)  # it has failed Ray's health check, and was replaced

        # Connections through a front end end with it. Asked again with its seed, a request gives the same text.
        cut = await server.streams(STREAMS, TOKENS, begun=lambda: server.kill_one("front"), again=True)
        begins = [(each.cut, each.text) for each in cut if each.cut is not None]
        assert 0 < len(begins) < STREAMS
        assert all(text.startswith(begin) for begin, text in begins)
        assert texts(cut) == texts(undisturbed)
        with capsys.disabled():
            print(f"a front end of two is killed: {len(begins)} of {STREAMS} connections break, no text is wrong")
        await asyncio.to_thread(eventually, server.ready)
        assert texts(await server.streams(STREAMS, TOKENS)) == texts(undisturbed)

        server.kill_one("directory")
        assert texts(await server.streams(STREAMS, TOKENS)) == texts(undisturbed)
        await asyncio.to_thread(eventually, lambda: server.get("/metrics").text.count('process="engine-0-') > 2)
    assert "Traceback" not in server.log


async def test_engines_follow_the_load_and_no_stream_is_harmed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = ("ray.max_replicas=3", "ray.upscale_seconds=1", "ray.downscale_seconds=5")
    with cluster(tmp_path, ONE_CORE, "scheduler.max_running=8", *scaling) as server:
        undisturbed = await server.streams(STREAMS, TOKENS)
        most, stop = 0, asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                assert texts(await server.streams(STREAMS, TOKENS)) == texts(undisturbed)

        loading = asyncio.create_task(load())
        async with asyncio.timeout(HANG_SECONDS):
            while most < 3 and not loading.done():
                most = max(most, await asyncio.to_thread(server.engines))
                await asyncio.sleep(0.5)
        stop.set()
        await loading
        # Few streams go on while two of three engines are ended.
        long = asyncio.create_task(server.streams(2, 8000))
        await asyncio.to_thread(server.until_engines, 1)
        moved = await long
        alone = await server.streams(2, 8000)
        assert texts(moved) == texts(alone)
        report(capsys, "engines are scaled from 3 to 1", alone, moved)


class Nodes:
    """A cluster of Ray that `ray start` has started."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *flags: str) -> None:
        """Starts one more node, the head first, and waits until it is there."""
        log = self._folder / "ray.log"
        ray = str(Path(sys.executable).parent / "ray")
        anywhere = "--min-worker-port=0", "--max-worker-port=0"  # Ray's own range has ports that are given out here
        environment = clean_environment() | ENVIRONMENT
        with log.open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    [ray, "start", "--block", "--object-store-memory=100000000", *anywhere, *flags],
                    env=environment,
                    stdout=output,
                    stderr=output,
                )
            )
        started = len(self._processes)
        eventually(lambda: log.read_text().count("Ray runtime started.") == started, HANG_SECONDS, log.read_text)

    def processes(self) -> list[psutil.Process]:
        """All of the nodes: what Ray has started there are their children."""
        return [each for node in self._processes for each in psutil.Process(node.pid).children(recursive=True)]

    def kill_head(self) -> None:
        for process in self.processes():
            if "gcs_server" in " ".join(process.cmdline()):
                process.kill()

    def close(self) -> None:
        for process in self._processes:
            left = []
            with contextlib.suppress(psutil.Error):
                left = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(HANG_SECONDS)
            for each in left:
                with contextlib.suppress(psutil.Error):
                    each.kill()


@pytest.fixture(scope="module")
def ray_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    nodes.start("--head", f"--port={nodes.port}", "--include-dashboard=false", "--num-cpus=2")
    yield nodes
    nodes.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["engine.replicas=3", "engine.threads=64", "ray.address=127.0.0.1:{port}"], "engine.threads: an engine of"),
        (
            ["engine.replicas=64", "engine.threads=2", "ray.address=127.0.0.1:{port}"],
            "engine.replicas: the cluster's nodes have room for 1 of 64 engines",
        ),
        (["ray.address=127.0.0.1:1"], "ray.address: no head node of a Ray cluster answers at 127.0.0.1:1"),
        (["ray.start_seconds=0.5"], "ray.start_seconds: not all of it was ready within 0.5 s: "),
        (["store.path=/dev/null/x"], "store.path: /dev/null/x cannot be made"),
        (["engine.state_memory=1 KiB"], "engine.state_memory"),
    ],
    ids=[
        "no node is so large",
        "more than there are",
        "no cluster",
        "not in time",
        "no store",
        "an engine cannot start",
    ],
)
def test_what_cannot_start_says_why(options: list[str], reason: str, tmp_path: Path, ray_nodes: Nodes) -> None:
    given = [option.format(port=ray_nodes.port) for option in options]
    with cluster(tmp_path, *given, wait=False) as server:
        assert server.process.wait(HANG_SECONDS) == 2, server.log
        said = [line for line in server.log.splitlines() if line.startswith("bdh-batch: ")]
        assert len(said) == 1, server.log
        assert reason in said[0]


def test_engines_on_other_nodes_and_a_head_node_that_is_gone(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path)
    try:
        nodes.start("--head", f"--port={nodes.port}", "--include-dashboard=false", "--num-cpus=1")
        nodes.start(f"--address=127.0.0.1:{nodes.port}", "--num-cpus=1")
        options = (f"ray.address=127.0.0.1:{nodes.port}", "engine.replicas=2", ONE_CORE)
        with cluster(tmp_path, *options, wait=False) as server:
            assert server.process.wait(HANG_SECONDS) == 2, server.log
            assert re.search(r"bdh-batch: on the node .*: store\.path: .* a folder that all nodes share", server.log)
        with cluster(tmp_path, *options, f"store.path={tmp_path / 'store'}") as server:
            server.until_engines(2)
            told = asyncio.run(server.streams(8, TOKENS, begun=lambda: server.kill_one("engine-0", nodes.processes())))
            assert {each.finish_reason for each in told} == {"length"}
            nodes.kill_head()
            assert server.process.wait(HANG_SECONDS) == 1, server.log
            assert "the head node of the Ray cluster at" in server.log
    finally:
        nodes.close()
