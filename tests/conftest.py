"""Real servers for the tests: each is `bdh-batch serve` in a process of its own, spoken to over TCP alone.

Most processes are forked from one that has the package imported (`launcher.py`); those that a test asks to start afresh
are `python -m bdh_batch`, as a user starts it.

Test modules take from here only fixtures at run time, and types for the type checker.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

from tests.launcher import Launcher, Process
from tests.streams import look_at_all

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

# How long an example takes, or making it, says more about what else the machine does than about what is tested.
settings.register_profile("gate", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gate")


def has_gpu() -> bool:
    """Asks torch only where a driver's device is: a process that directs others need not import it."""
    if not any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg")):
        return False
    import torch

    return torch.cuda.is_available()


# Triton reads this when it is imported, for the whole process, and nothing has imported it yet: bdh-cq's dependencies
# would. Kernels are compiled in a process of their own (`benchmarks/engine/gpu_compile.py`). Where there is a GPU, the
# same tests run on it.
if not has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton from 3.9 on warns where this is not said

ROOT = Path(__file__).parent.parent
# No test speaks to a server of the world. Clients read the certificates that they trust when they are made, those of
# all the world's authorities in 30 ms, again and again; here and in all programs that tests start, it is one.
os.environ.setdefault("SSL_CERT_FILE", str(ROOT / "tests" / "data" / "tls" / "cert.pem"))
CONFORMANCE = ROOT / "tests" / "data" / "conformance"
# Nothing here takes nearly as long: what does is a failure, and a machine that is busy with other work is none.
HANG_SECONDS = 300.0
START_SECONDS = 900.0  # where no cache holds the kernels yet, they are compiled first
POLL_SECONDS = 0.01
POLL_SHARE = 0.05  # of the time waited so far, until the next look
# A step of a model of a few thousand parameters takes a third more processor time on two threads, and no less time. The
# bundled model's server has a thread for each core.
ONE_THREAD = {"BDH_ENGINE__THREADS": "1"}
SEVERAL = ("engine.replicas=", "models=", "server.workers=")  # options for which a server has several processes
LONG_NAME = (
    "tiny-" + "x" * 4000
)  # asked for under it, a response has frames of 4 KiB: few tokens fill a socket's buffers

ServeFactory = Callable[..., AbstractContextManager["Server"]]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays: the collector need not walk it, now or at its later rounds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def eventually(
    condition: Callable[[], bool], within: float = HANG_SECONDS, what: Callable[[], object] = lambda: ""
) -> None:
    """Polls until `condition` holds; fails with `what` when it does not `within` that many seconds.

    The longer it has taken, the less often: who waits for seconds does not take them from what it waits for.
    """
    begun = time.monotonic()
    while not condition():
        elapsed = time.monotonic() - begun
        assert elapsed < within, f"not within {within} s: {what()}"
        time.sleep(max(POLL_SECONDS, POLL_SHARE * elapsed))


class RawStream:
    """A client that does only what a test tells it to: sends its request, and reads when asked."""

    def __init__(
        self,
        port: int,
        path: str,
        body: Mapping[str, Any],
        receive_buffer: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(HANG_SECONDS)
        self.socket.connect(("127.0.0.1", port))
        content = json.dumps(body).encode()
        given = {"host": "test", "connection": "close", "content-length": len(content), **headers}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
        self.socket.sendall("\r\n".join(lines).encode() + content)
        self.received = b""

    def read_until(self, mark: bytes) -> None:
        while mark not in self.received:
            got = self.socket.recv(65536)
            assert got, f"the server closed before {mark!r} came: {self.received!r}"
            self.received += got

    def read_all(self) -> bytes:
        """Everything up to the server's close."""
        pieces = [self.received]
        while got := self.socket.recv(1 << 20):
            pieces.append(got)
        self.received = b"".join(pieces)
        return self.received

    @property
    def status(self) -> int:
        self.read_until(b"\r\n")
        return int(self.received.split(b" ", 2)[1])

    def close(self, reset: bool = False) -> None:
        if reset:  # no farewell: the peer learns by an RST
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()


class Server:
    """A server that runs, and the ways to speak to it."""

    def __init__(self, process: Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=HANG_SECONDS)
        self._log = log
        self._code = 0

    @property
    def log(self) -> str:
        return self._log.read_text()

    def openai(self, api_key: str = "none") -> OpenAI:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=HANG_SECONDS)

    def async_openai(self, api_key: str = "none") -> AsyncOpenAI:
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=HANG_SECONDS)

    def raw(
        self,
        body: Mapping[str, Any],
        path: str = "/v1/completions",
        receive_buffer: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> RawStream:
        return RawStream(self.port, path, body, receive_buffer, headers)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The response of /v1/completions; it must be one."""
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        content: dict[str, Any] = response.json()
        return content

    def text(self, **body: Any) -> str:
        return str(self.complete(**body)["choices"][0]["text"])

    def events(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that must end well."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            raw = b"".join(response.iter_raw())
        # Every frame is valid on its own: a character cut in two would fail here.
        frames = [frame.decode("utf-8", "strict") for frame in raw.split(b"\n\n")]
        assert frames.pop() == ""
        assert frames.pop() == "data: [DONE]"
        assert all(frame.startswith("data: {") for frame in frames)
        return [json.loads(frame.removeprefix("data: ")) for frame in frames]

    def refusal(
        self,
        body: object = None,
        path: str = "/v1/completions",
        status: int = 400,
        content: bytes | Iterator[bytes] | None = None,
    ) -> dict[str, Any]:
        """The error response to a POST of `body`, or of `content` as it is."""
        raw = json.dumps(body).encode() if content is None else content
        return self.error(self.http.post(path, content=raw), status)

    @staticmethod
    def error(response: httpx.Response, status: int) -> dict[str, Any]:
        """The error that `response` has; it must be whole, and typed as its status says."""
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-request-id"]
        body = response.json()
        assert body.keys() == {"error"}
        error: dict[str, Any] = body["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        assert "Traceback" not in error["message"]
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        } | dict.fromkeys((408, 504), "timeout_error")
        assert error["type"] == kinds.get(status, "service_unavailable" if status == 503 else "invalid_request_error")
        if status in (429, 503):
            assert 1 <= int(response.headers["retry-after"]) <= 60
        return error

    def metrics(self) -> dict[str, float]:
        """Samples by name; labels other than model_name follow it, as in `x{reason=y}`."""
        lines = (line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#"))
        return {sample_name(name): float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def until(self, condition: Callable[[dict[str, float]], bool], within: float = HANG_SECONDS) -> None:
        """Polls /metrics until `condition` holds of them."""
        eventually(lambda: condition(self.metrics()), within, self.metrics)

    def until_idle(self, within: float = HANG_SECONDS) -> None:
        """Until nothing runs or waits in the engine."""
        self.until(lambda m: m["bdh_num_requests_running"] == m["bdh_num_requests_waiting"] == 0, within)

    def until_alone(self) -> None:
        """Until the engine is idle, and no request is left but the one that asks."""
        self.until_idle()
        self.until(lambda m: m["bdh_http_requests_in_flight"] == 1)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once, as a lack of memory may."""
        self._code = -signal.SIGKILL
        self.process.kill()

    def exit_code(self, within: float = HANG_SECONDS) -> int:
        return self.process.wait(within)

    def stop(self, cutting: bool = False) -> None:
        """Ends the server as its user would, and looks whether it fared well. Idempotent."""
        self.http.close()
        if self.process.poll() is None:
            self.terminate()
        try:
            code = self.exit_code()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        assert code == self._code, self.log
        if not cutting:
            assert not re.search(
                r'Traceback|Task exception| (ERROR|CRITICAL) |"level": "(error|critical)"', self.log
            ), self.log


@functools.cache
def sample_name(text: str) -> str:
    """The name of a sample as `Server.metrics` has it: pages are asked for again and again, and have the same ones."""
    name, _, given = text.partition("{")
    labels = ",".join(
        f"{k}={v}" for k, v in sorted(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', given)) if k != "model_name"
    )
    return name + (f"{{{labels}}}" if labels else "")


def candidates() -> Iterator[int]:
    """Ports below those that the system gives to whoever asks for any; each process of a run that tests has its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    first = random.randrange(1250)
    while True:
        yield from (10_000 + 16 * ((first + number) % 1250) + worker for number in range(1250))


CANDIDATES = candidates()


def free_port() -> int:
    """A port that nobody has, nor takes before the server starts for which it is."""
    for port in islice(CANDIDATES, 1250):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports are taken")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("BDH_")}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bdh_batch", *map(str, arguments)]


def of_several(arguments: Iterable[object]) -> bool:
    """Whether a server with these options starts processes, which are forked, too."""
    return any(str(each).startswith(SEVERAL) for each in arguments)


@pytest.fixture(scope="session", autouse=True)
def wrong_responses() -> Iterator[list[str]]:
    """What is wrong with the responses and streams that tests have read (`streams.py`)."""
    wrong: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        look_at_all(patch, wrong)
        yield wrong


@pytest.fixture(autouse=True)
def _responses_are_right(wrong_responses: list[str]) -> Iterator[None]:
    yield
    wrong, wrong_responses[:] = [*wrong_responses], []
    assert not wrong


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Where forked programs come from."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def serve(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> ServeFactory:
    """Starts servers: `with serve("auth.enabled=true", model=folder) as server`; each is stopped and looked at."""

    @contextlib.contextmanager
    def start(
        *options: str,
        model: Path | None = None,
        wait: bool = True,
        env: Mapping[str, str] | None = None,
        cutting: bool = False,  # the server must cut a client off at its end, and may say so in its log
        whole_end: bool = False,  # the interpreter is taken down, too; with `cutting` and `inside` always
        inside: Sequence[object] = (),  # a command that becomes the server, in the environment that it makes
        verb: str = "serve",
        port: int | None = None,
    ) -> Iterator[Server]:
        port, log = port or free_port(), tmp_path_factory.mktemp("server") / "log"
        arguments = [verb, "--port", str(port), *(part for option in options for part in ("--set", option))]
        if model is not None:
            arguments += ["--model", str(model)]
        environment = clean_environment() | ({} if model is None else ONE_THREAD) | dict(env or {})
        with log.open("wb") as output:
            process: Process
            if inside:
                process = subprocess.Popen(
                    [*map(str, inside), *command(*arguments)],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            else:
                brief, forks = not (cutting or whole_end), of_several(options)
                process = launcher.start(arguments, environment, output, brief_end=brief, forks=forks)
        server = Server(process, port, log)
        try:
            if wait:
                wait_until_ready(server)
            yield server
        finally:
            server.stop(cutting)

    return start


def wait_until_ready(server: Server) -> None:
    def ready() -> bool:
        assert server.process.poll() is None, f"the server ended at its start: {server.log}"
        try:
            return server.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    eventually(ready, START_SECONDS, lambda: server.log)


@pytest.fixture(scope="session")
def both(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """The two servers that most tests use. Where no cache holds the kernels yet, the first compiles them for both, and
    for those of other processes that run tests."""
    of_bytes = serve(f"model.aliases=minute,{LONG_NAME}", model=CONFORMANCE / "tiny", wait=False)
    sizes = ("scheduler.max_running=96", "engine.state_memory=2 GiB")
    with contextlib.ExitStack() as servers:
        with one_at_a_time(tmp_path_factory):
            tiny = servers.enter_context(of_bytes)
            wait_until_ready(tiny)
        yield servers.enter_context(serve(*sizes)), tiny


@contextlib.contextmanager
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Waits for the other processes of this run that are in here."""
    base = tmp_path_factory.getbasetemp()
    with (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base).joinpath("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def server(both: tuple[Server, Server]) -> Server:
    """The bundled model."""
    return both[0]


@pytest.fixture(scope="session")
def tiny(both: tuple[Server, Server]) -> Server:
    """A random model of bytes: fast, and full of characters that are not ASCII."""
    return both[1]


@pytest.fixture(scope="session")
def long_name() -> str:
    """A name of `tiny`'s model; asked for under it, a stream has frames of 4 KiB: few tokens fill all buffers."""
    return LONG_NAME


@pytest.fixture(scope="session")
def odd(serve: ServeFactory) -> Iterator[Server]:
    """A model of 97 tokens that no tokenizer goes with."""
    with serve(model=CONFORMANCE / "odd-sizes") as server:
        yield server


@pytest.fixture(scope="session")
def cli(launcher: Launcher) -> Cli:
    """Runs the command line to its end; `afresh` where the environment is for Python's own start."""

    def run(
        *arguments: object, env: Mapping[str, str] | None = None, afresh: bool = False
    ) -> subprocess.CompletedProcess[str]:
        environment = clean_environment() | dict(env or {})
        if afresh:
            return subprocess.run(
                command(*arguments),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=START_SECONDS,
            )
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as problems:
            forks = of_several(arguments)
            started = launcher.start(arguments, environment, output, problems, brief_end=True, forks=forks)
            code = started.wait(START_SECONDS)
            for each in (output, problems):
                each.seek(0)
            return subprocess.CompletedProcess(command(*arguments), code, output.read(), problems.read())

    return run
