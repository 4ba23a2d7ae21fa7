"""From start to exit: what cannot work says why in one line; what runs is brought to an end that clients understand."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.conftest import eventually

if TYPE_CHECKING:
    from tests.conftest import Cli, RawStream, ServeFactory, Server

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "data" / "conformance" / "tiny"
ENDLESS = {"prompt": "a", "max_tokens": 100_000, "stream": True}
NEVER = "server.drain_seconds=3600"  # longer than any test waits: who ends does not wait for all of it


class TestStart:
    def refused(self, cli: Cli, *arguments: object, env: dict[str, str] | None = None) -> str:
        """The one line that explains why the command did not run."""
        ended = cli(*arguments, env=env)
        assert ended.returncode == 2, ended
        assert ended.stdout == ""
        lines = [line for line in ended.stderr.splitlines() if not re.match(r"\d{4}-\d\d-\d\d .* INFO ", line)]
        assert len(lines) == 1, ended.stderr
        assert lines[0].startswith("bdh-batch: ")
        return lines[0]

    def test_needs_a_free_port(self, cli: Cli) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            line = self.refused(cli, "serve", "--port", port, "--model", TINY)
        assert "server.port" in line
        assert str(port) in line

    def test_needs_a_model(self, cli: Cli, tmp_path: Path) -> None:
        line = self.refused(cli, "serve", "--port", 0, "--model", tmp_path / "missing")
        assert "model.path" in line
        assert str(tmp_path / "missing") in line

    def test_needs_a_whole_model(self, cli: Cli, tmp_path: Path) -> None:
        folder = shutil.copytree(TINY, tmp_path / "cut")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert str(weights) in self.refused(cli, "serve", "--port", 0, "--model", folder)

    def test_needs_keys_where_they_are_asked_for(self, cli: Cli) -> None:
        line = self.refused(cli, "serve", "--port", 0, "--model", TINY, "--set", "auth.enabled=true")
        assert "auth.api_keys" in line

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--set", "server.prot=1"], ["server.prot", "server.port?"]),
            (["--set", "sevrer.port=1"], ["sevrer.port", "server.port?"]),
            (["--set", "server.port"], ["OPTION=VALUE"]),
            (["--set", "server.port=http"], ["server.port", "http"]),
            (["--set", "server.workers=0"], ["server.workers"]),
            (["--set", "engine.replicas=2", "--set", "engine.devices=cpu"], ["engine.replicas", "engine.devices"]),
            (["--set", "server.workers=2", "--set", "rate_limiting.enabled=true"], ["rate_limiting.storage", "redis"]),
            (["--device", "tpu"], ["model.device", "tpu"]),
            (["--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
        ],
    )
    def test_needs_options_that_exist_and_fit(self, cli: Cli, arguments: list[str], words: list[str]) -> None:
        line = self.refused(cli, "serve", *arguments)
        assert all(word in line for word in words), line

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("server: {prot: 1}", ["server.prot", "server.port?"]),
            ("sevrer: {port: 1}", ["sevrer", "server?"]),
            ("server: {port: many}", ["server.port", "many"]),
            ("server: 8000", ["server"]),
            ("server: {port: 1", ["YAML"]),
        ],
    )
    def test_needs_a_file_of_options_that_exist_and_fit(
        self, cli: Cli, tmp_path: Path, text: str, words: list[str]
    ) -> None:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        line = self.refused(cli, "serve", "--config", file)
        assert str(file) in line
        assert all(word in line for word in words), line

    @pytest.mark.parametrize(
        ("variable", "value", "words"),
        [
            ("BDH_SERVER__PROT", "1", ["BDH_SERVER__PROT", "server.port?"]),
            ("BDH_SERVER__PORT", "many", ["server.port", "environment", "many"]),
            ("BDH_SEVRER__PORT", "1", ["BDH_SEVRER__PORT", "server.port?"]),
            ("BDH_SERVER", '{"port": "many"}', ["server.port", "environment", "many"]),
        ],
    )
    def test_needs_an_environment_that_fits(self, cli: Cli, variable: str, value: str, words: list[str]) -> None:
        line = self.refused(cli, "serve", env={variable: value})
        assert all(word in line for word in words), line


@pytest.fixture(scope="module")
def forsaken(serve: ServeFactory, long_name: str) -> Iterator[Future[int]]:
    """How a server ends that is told to while a client does not read; it waits as long for that one as it may."""
    options = ("server.drain_seconds=0.1", f"model.name={long_name}")
    with serve(*options, model=TINY, cutting=True) as server, ThreadPoolExecutor(1) as pool:
        sleeper = server.raw(ENDLESS | {"n": 10}, receive_buffer=4096)
        server.until(lambda m: m["bdh_generation_tokens_total"] > 2500)
        server.terminate()
        yield pool.submit(server.exit_code)
        sleeper.close()


@pytest.mark.usefixtures("forsaken")  # which ends while these tests run
def test_nothing_is_served_before_the_model_is_warm(serve: ServeFactory) -> None:
    """Warming computes a prefill chunk: a large one takes long enough to be seen, unless the test is late."""
    for _ in range(10):
        with serve("scheduler.prefill_tokens=512", "scheduler.max_running=8", wait=False, whole_end=True) as server:
            eventually(lambda: listens(server.port))
            gets = {path: server.http.get(path) for path in ("/readyz", "/health", "/", "/metrics", "/v1/models")}
            posts = [server.http.post("/v1/completions", json={"prompt": prompt}) for prompt in ("a", 5)]
            server.terminate()  # must be heard while the model loads
            assert server.exit_code() == 0
        if "is ready" not in server.log:
            break
    else:
        raise AssertionError("the model was warm before it was asked")
    for response in (gets["/readyz"], gets["/v1/models"], posts[0]):
        assert "the model is loading" in server.error(response, 503)["message"]
    assert server.error(posts[1], 400)["param"] == "prompt"
    assert gets["/health"].status_code == 200
    assert gets["/"].json()["status"] == "the model is loading"
    assert "bdh_http_requests_in_flight" in gets["/metrics"].text


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_an_idle_server_ends_at_once(serve: ServeFactory) -> None:
    with serve(NEVER, model=TINY, whole_end=True) as server:
        assert server.complete(prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1
        server.terminate()
        assert server.exit_code() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def begin_drain(server: Server) -> None:
    server.terminate()
    eventually(lambda: server.http.get("/readyz").status_code != 200)


def frames(stream: RawStream) -> list[Any]:
    """What a stream got until the server closed it."""
    payload = stream.read_all()
    stream.close()
    found = re.findall(rb"^data: (.*)$", payload.partition(b"\r\n\r\n")[2], re.MULTILINE)
    return ["[DONE]" if frame == b"[DONE]" else json.loads(frame) for frame in found]


def test_a_drain_lets_streams_finish_and_takes_nothing_new(serve: ServeFactory) -> None:
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 300, "seed": 3}
    options = (NEVER, "scheduler.max_running=4", "scheduler.quantum_steps=100000")  # nobody gives way
    with serve(*options, model=TINY, whole_end=True) as server, ThreadPoolExecutor(1) as pool:
        gates = [server.raw(ENDLESS) for _ in range(4)]  # have all slots until they are closed here
        for gate in gates:
            gate.read_until(b"data: ")
        streams = [server.raw(body | {"stream": True}) for _ in range(5)]
        unstreamed = pool.submit(server.text, **body)
        server.until(lambda m: m["bdh_num_requests_waiting"] == 6)
        begin_drain(server)

        assert server.metrics()["bdh_num_requests_running"] == 4
        for stream_too in (False, True):
            error = server.refusal({"prompt": "a", "stream": stream_too}, status=503)
            assert (error["type"], error["code"]) == ("service_unavailable", "service_unavailable")
        server.refusal({"messages": [{"role": "user", "content": "a"}]}, "/v1/chat/completions", 503)
        response = server.http.get("/readyz")
        assert server.error(response, 503)["message"] == "the server is shutting down"
        assert server.http.get("/health").status_code == 200

        for gate in gates:
            gate.close()
        text = unstreamed.result()
        for stream in streams:
            *chunks, done = frames(stream)
            assert done == "[DONE]"
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert server.exit_code() == 0


def test_a_drain_that_runs_out_of_time_ends_streams_with_an_error(serve: ServeFactory) -> None:
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # `nohup` has the server ignore it, too
    with (
        serve(model=TINY, env={"BDH_SERVER__DRAIN_SECONDS": "0.2"}, whole_end=True) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 100_000, "stream": True}
        streams = [*(server.raw(ENDLESS | {"n": n}) for n in (1, 1, 1, 3)), server.raw(chat, "/v1/chat/completions")]
        for stream in streams:
            stream.read_until(b"data: ")
        unstreamed = pool.submit(server.http.post, "/v1/completions", json=ENDLESS | {"stream": False})
        server.until(lambda m: m["bdh_num_requests_running"] == 8)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM if ignored else signal.SIGHUP)
        for stream in streams:
            *chunks, last = frames(stream)
            assert last.keys() == {"error"}
            assert last["error"].keys() == {"message", "type", "param", "code"}
            assert "shutting down" in last["error"]["message"]
            assert all("choices" in chunk for chunk in chunks)
        response = unstreamed.result()
        assert response.status_code in (500, 503)
        assert response.json()["error"]["message"]
        assert server.exit_code() == 0
        assert time.monotonic() - began >= 0.2


def test_a_second_signal_does_not_wait_for_the_drain(serve: ServeFactory) -> None:
    with serve(NEVER, model=TINY, whole_end=True) as server:
        stream = server.raw(ENDLESS)
        stream.read_until(b"data: ")
        begin_drain(server)
        server.process.send_signal(signal.SIGINT)
        assert server.exit_code() == 0
        stream.close()


def test_a_client_that_does_not_read_does_not_keep_the_server_from_ending(forsaken: Future[int]) -> None:
    assert forsaken.result() == 0
