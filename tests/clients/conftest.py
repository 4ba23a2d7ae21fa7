"""Servers for clients of others. `make clients` installs the clients into an environment of their own, which has
nothing of this project's; the server runs with the Python of BDH_PYTHON, which has.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 600.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.02
KEY = "key-of-the-clients"
ENDLESS = {"prompt": "a", "max_tokens": 100_000, "stream": True}

# Nothing that is not needed leaves this machine, and no proxy stands before the server.
os.environ |= {
    "ANONYMIZED_TELEMETRY": "False",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OTEL_SDK_DISABLED": "true",
}


@dataclass(frozen=True)
class Endpoint:
    """What a client is told of a server."""

    origin: str
    key: str = KEY
    model: str = "bdh-shakespeare"

    @property
    def url(self) -> str:
        return f"{self.origin}/v1"

    @property
    def bearer(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def metric(self, name: str) -> float:
        """The sum of all samples of that name."""
        text = httpx.get(f"{self.origin}/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="session")
def endpoint() -> Iterator[Endpoint]:
    """The bundled model, for those who have the key; or a server that runs already, at BDH_ORIGIN."""
    running = os.environ.get("BDH_ORIGIN")
    with serve() if running is None else contextlib.nullcontext(Endpoint(running)) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def narrow() -> Iterator[Endpoint]:
    """A server that has room for one request, and one that waits."""
    with serve("scheduler.max_running=1", "scheduler.max_queued_requests=1") as endpoint:
        yield endpoint


@pytest.fixture
def busy(narrow: Endpoint) -> Iterator[Endpoint]:
    """A server that has no room, but will when it has refused a request."""
    refused = narrow.metric("bdh_admission_rejections_total")
    stop = threading.Event()

    def occupy(stack: contextlib.ExitStack) -> Iterator[bytes]:
        request = {"method": "POST", "url": f"{narrow.url}/completions", "json": ENDLESS, "headers": narrow.bearer}
        # The second one's response begins only when it runs: nobody waits for that.
        client = stack.enter_context(httpx.Client(timeout=60))
        chunks = stack.enter_context(client.stream(**request)).iter_raw()
        next(chunks)
        waiting = stack.enter_context(socket.create_connection(("127.0.0.1", httpx.URL(narrow.url).port)))
        built = client.build_request(**request)
        head = "".join(f"{name}: {value}\r\n" for name, value in built.headers.items())
        waiting.sendall(f"POST {built.url.path} HTTP/1.1\r\n{head}\r\n".encode() + built.read())
        until(lambda: narrow.metric("bdh_num_requests_waiting") == 1)
        return chunks  # held on to: with it, the connection would end

    def free(stack: contextlib.ExitStack) -> None:
        with stack:
            until(lambda: stop.is_set() or narrow.metric("bdh_admission_rejections_total") > refused)

    stack = contextlib.ExitStack()
    chunks = occupy(stack)
    thread = threading.Thread(target=free, args=(stack,))
    thread.start()
    try:
        yield narrow
        assert narrow.metric("bdh_admission_rejections_total") > refused, "the client was to be refused first"
    finally:
        stop.set()
        thread.join()
        del chunks
        until(lambda: narrow.metric("bdh_num_requests_running") == 0)


@contextlib.contextmanager
def serve(*options: str) -> Iterator[Endpoint]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("auth.enabled=true", f"auth.api_keys={KEY}", *options)
    arguments = [argument for option in options for argument in ("--set", option)]
    command = [os.environ["BDH_PYTHON"], "-m", "bdh_batch", "serve", "--port", str(port), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BDH_", "OTEL_"))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            until(lambda: ready(process, port), START_SECONDS)
            yield Endpoint(f"http://127.0.0.1:{port}")
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_SECONDS) == 0
            log.seek(0)
            assert not re.search(rb"Traceback|Task exception| (ERROR|CRITICAL) ", log.read())
        finally:
            process.kill()
            process.wait()


def ready(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "the server ended at its start"
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def until(condition, within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(POLL_SECONDS)
