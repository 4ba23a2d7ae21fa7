"""A server on a real cluster of Ray, on this machine, and what is done to it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from openai import APIError, AsyncOpenAI

from tests.conftest import HANG_SECONDS, ROOT, START_SECONDS, clean_environment, command, eventually, free_port

# A token that all nodes have, no reports to Ray's makers, and loads that are reported soon.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "that of the tests, which is long enough",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TMPDIR": "/tmp",  # paths of sockets are short
}
AGAIN_SECONDS = 0.1  # until a client asks again


@dataclass
class Told:
    """What a client got of one stream.

    Args:
        pause: the longest time between two chunks, in seconds.
        cut: what had come where the connection ended before the stream did; None where it did not.
    """

    text: str = ""
    finish_reason: str | None = None
    pause: float = 0.0
    cut: str | None = None


class Cluster:
    """`bdh-batch ray up`, which runs."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=HANG_SECONDS)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(httpx.HTTPError):
            return self.get("/readyz").status_code == 200
        return False

    def engines(self) -> int:
        """How many engines compute, as the front end that is asked knows them."""
        response = self.get("/server_info")
        known = response.json()["engines"] if response.status_code == 200 else []
        return [each["state"] for each in known].count("ready")

    def until_engines(self, count: int) -> None:
        eventually(lambda: self.engines() == count, HANG_SECONDS, lambda: self.log)

    def kill_one(
        self, deployment: str, among: Sequence[psutil.Process] | None = None, number: int = signal.SIGKILL
    ) -> None:
        """Sends a signal to a process of a deployment, which is known by the name that Ray gives it.

        Args:
            among: where it is looked for; None is where this server has started a cluster.
        """
        every = psutil.Process(self.process.pid).children(recursive=True) if among is None else among
        next(each for each in every if f"bdh-batch:{deployment}" in " ".join(each.cmdline())).send_signal(number)

    async def streams(
        self, count: int, tokens: int, begun: Callable[[], object] | None = None, again: bool = False
    ) -> list[Told]:
        """Streams of the official client, each with a prompt and a seed of its own.

        Args:
            begun: is called once each of them has begun.
            again: whether a client whose connection ends asks again with the same seed, until it has the whole text.
        """
        told = [Told() for _ in range(count)]
        client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=HANG_SECONDS)
        async with client:
            reading = [
                asyncio.create_task(_read(client, number, tokens, each, again)) for number, each in enumerate(told)
            ]
            if begun is not None:
                while not all(len(each.text) > 8 or task.done() for each, task in zip(told, reading, strict=True)):
                    await asyncio.wait(reading, timeout=0.01)
                begun()
            await asyncio.gather(*reading)
        return told

    def stop(self) -> int:
        """Ends it as its user would, and returns the exit code. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(HANG_SECONDS)


async def _read(client: AsyncOpenAI, number: int, tokens: int, told: Told, again: bool) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not await _is_read(client, number, tokens, told) and again:
            told.text = ""
            await asyncio.sleep(AGAIN_SECONDS)


async def _is_read(client: AsyncOpenAI, number: int, tokens: int, told: Told) -> bool:
    """Returns whether the connection lasted as long as the stream."""
    prompt, last = f"The {number}th scene:\n", time.monotonic()
    try:
        stream = await client.completions.create(
            model="bdh-shakespeare", prompt=prompt, max_tokens=tokens, seed=number, stream=True
        )
        async for chunk in stream:
            now = time.monotonic()
            told.pause, last = max(told.pause, now - last), now
            for choice in chunk.choices:
                told.text += choice.text
                told.finish_reason = choice.finish_reason or told.finish_reason
    except (APIError, httpx.HTTPError):
        told.cut = told.text if told.cut is None else told.cut
        return False
    return True


@contextlib.contextmanager
def cluster(folder: Path, *options: str, wait: bool = True) -> Iterator[Cluster]:
    """Starts a cluster and the server on it; all that was started has ended afterwards."""
    port, log = free_port(), folder / "log"
    flags = [part for option in options for part in ("--set", option)]
    environment = clean_environment() | ENVIRONMENT
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("ray", "up", "--port", port, *flags),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    found = Cluster(process, port, log)
    try:
        if wait:
            eventually(found.ready, START_SECONDS, lambda: found.log)
        yield found
    finally:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        found.stop()
        for each in left:
            with contextlib.suppress(psutil.Error):
                each.kill()
