"""The soak's server, and what can be seen of it from outside; of a process of the soak's own its objects, too."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bdh_batch.checkpoint.config import BDHConfig, bytes_per_sequence
from bdh_batch.engine.loading import attention_window
from benchmarks.client import Client

DEVICE, HOST, RUNNING, QUEUED = 16, 16, 24, 48  # slots for states, sequences under way, requests that wait
KEYS = ("soak-1", "soak-2", "soak-3")
WORDY = "soak-" + "x" * 4000
START_SECONDS = 600.0  # on a machine that is busy otherwise, too
LOOK_SECONDS = 60.0
REST_SECONDS = 60.0
STOP_SECONDS = 60.0
BAD_LINES = re.compile(
    r"Task exception|Exception in|exception was never retrieved| CRITICAL | ERROR asyncio|request \S+ to"
)

Metrics = dict[str, float]


class Watched:
    """A server that is looked at from outside. Each look has a connection of its own, as open ones are counted."""

    def __init__(self, url: str, pid: int | None, census_file: Path | None = None) -> None:
        self._client = Client(url, keep=False)
        self.host, self.port = self._client.address.host, self._client.address.port
        self.process = None if pid is None else psutil.Process(pid)
        self._census_file = census_file

    async def metrics(self) -> Metrics:
        return await asyncio.wait_for(self._client.metrics(), LOOK_SECONDS)

    async def health(self) -> str:
        status, content = await asyncio.wait_for(self._client.whole("GET", "/health"), LOOK_SECONDS)
        return "ok" if status == 200 else content.decode()

    def sample(self) -> dict[str, int]:
        if self.process is None:
            return {}
        with self.process.oneshot():
            return {
                "rss": self.process.memory_info().rss,
                "threads": self.process.num_threads(),
                "files": self.process.num_fds(),
            }

    async def census(self) -> dict[str, Any]:
        if self.process is None or self._census_file is None:
            return {}
        self._census_file.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        file = self._census_file
        await until(file.exists, REST_SECONDS)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


async def until(condition: Callable[[], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.02)


class Own:
    """A server that the soak starts and ends."""

    def __init__(self, model: Path, seed: int, often: float, folder: Path) -> None:
        self.log = folder / "log"
        self._census = folder / "census.json"
        self._output = folder / "url"
        arguments = ["--seed", seed, "--often", often, "--census", self._census]
        for option in options_for(model):
            arguments += ["--set", option]
        environment = {name: text for name, text in os.environ.items() if not name.upper().startswith("BDH_")}
        with self.log.open("wb") as log, self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.stress.faulty", *map(str, arguments)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
            )

    async def ready(self) -> Watched:
        def there() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at its start:\n{self.log.read_text()}")
            return self._output.read_bytes().endswith(b"\n")

        await until(there, START_SECONDS)
        return Watched(self._output.read_text().strip(), self.process.pid, self._census)

    def stop(self) -> list[str]:
        """Ends it as its user would; what was wrong with its end, and what its log says."""
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        lines = [f"log: {line}" for line in self.log.read_text().splitlines() if BAD_LINES.search(line)]
        return [*lines[:20], *([f"the server's exit code is {code}"] if code else [])]


def options_for(model: Path) -> list[str]:
    """Few slots, so that all of them are used, and everything that happens when they are."""
    config = BDHConfig.from_dict(json.loads((model / "config.json").read_text()))
    each = bytes_per_sequence(config, attention_window(None, config))
    return [
        "server.port=0",
        f"model.path={model}",
        f"model.aliases={WORDY}",
        "auth.enabled=true",
        f"auth.api_keys={','.join(KEYS)}",
        f"engine.state_memory={DEVICE * each}",
        f"prefix_cache.host_memory={HOST * each}",
        "engine.threads=1",  # the clients need a core, too
        f"scheduler.max_running={RUNNING}",
        f"scheduler.max_queued_requests={QUEUED}",
        "scheduler.quantum_steps=8",
    ]
