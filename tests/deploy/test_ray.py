"""The server on a real cluster of Ray: streams outlive their engine, and a drain ends them whole."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from bdh_batch.deploy.directory import Report
from bdh_batch.errors import ConfigError
from bdh_batch.settings import Settings, load
from tests.conftest import HANG_SECONDS, eventually
from tests.deploy.rays import cluster

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'bdh-batch[ray]'", exc_type=ImportError)

STREAMS, TOKENS = 8, 250


async def test_streams_on_a_cluster_outlive_their_engine_and_its_end(tmp_path: Path) -> None:
    with cluster(tmp_path, "engine.replicas=2", "engine.threads=1") as server:
        server.until_engines(2)
        undisturbed = await server.streams(STREAMS, TOKENS)
        assert {each.finish_reason for each in undisturbed} == {"length"}
        assert len({each.text for each in undisturbed}) == STREAMS

        for _ in range(10):
            moved = await server.streams(STREAMS, TOKENS, begun=lambda: server.kill_one("engine-0"))
            assert [each.text for each in moved] == [each.text for each in undisturbed]
            # Ray replaces what was killed, and each process is in the metrics.
            await asyncio.to_thread(server.until_engines, 2)
            if "is resumed on another engine" in server.log:
                break  # else the streams had ended before
        else:
            raise AssertionError("no engine was killed in the midst of a stream")
        await asyncio.to_thread(eventually, lambda: server.get("/metrics").text.count('process="engine-0-') > 2)
        page = server.get("/metrics").text
        assert 'process="front-' in page

        # What the server holds of bodies is bounded, and a client that leaves takes its request along.
        long = {"prompt": "x", "max_tokens": 100_000, "stream": True, "ignore_eos": True}
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS) as client,
            client.stream("POST", "/v1/completions", json=long) as response,
        ):
            await anext(response.aiter_lines())
        await asyncio.to_thread(eventually, lambda: "streams': [0, 0]" in streams_of(server.get("/server_info")))

        # A drain ends streams whole.
        drained = await server.streams(STREAMS, TOKENS, begun=server.process.terminate)
        assert [each.text for each in drained] == [each.text for each in undisturbed]
        assert await asyncio.to_thread(server.process.wait, HANG_SECONDS) == 0, server.log
    assert "Traceback" not in server.log


def test_what_serve_run_builds_takes_options_and_needs_no_cluster(tmp_path: Path) -> None:
    from bdh_batch.deploy.ray import app

    config = tmp_path / "server.yaml"
    config.write_text("engine: {replicas: 2, threads: 1}")
    assert app({"config": str(config), "server.workers": "1"})
    for given, named in (
        ({"engine.none": "1"}, "engine.none"),
        ({"config": str(tmp_path / "absent")}, "absent"),
        ({"config": str(config), "server.uds": "/run/x"}, "server.uds"),
    ):
        with pytest.raises(ConfigError, match=named):
            app(given)


def test_where_it_cannot_listen_is_said_before_a_cluster_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdh_batch.deploy import up

    def settings(host: str, port: int) -> Settings:
        return load(None, [("server.host", host), ("server.port", port)]).settings

    with pytest.raises(ConfigError, match=r"^server\.port: .* not 0$"):
        up.up(settings("127.0.0.1", 0), lambda url, names: None)
    started: list[object] = []
    monkeypatch.setattr("ray.serve.start", lambda **options: started.append(options["http_options"]["host"]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"^server\.port: 127\.0\.0\.1:\d+ cannot be listened at"):
            up._start_http(settings("127.0.0.1", taken.getsockname()[1]))
    try:
        with socket.socket(socket.AF_INET6) as free:
            free.bind(("::1", 0))
            port = free.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    up._start_http(settings("::1", port))
    assert started == ["::1"]


async def test_a_process_whose_reports_have_ended_is_unhealthy() -> None:
    from bdh_batch.deploy.replicas import DirectoryClient, Reporter

    def make() -> Report:
        raise ValueError("no figures")

    reporter = Reporter(DirectoryClient(cast(Any, SimpleNamespace(report=None))), make)
    while reporter.problem is None:  # noqa: ASYNC110 - it waits for another task
        await asyncio.sleep(0)
    assert "no figures" in reporter.problem


def streams_of(response: httpx.Response) -> str:
    return str({"streams": [each["streams"] for each in response.json()["engines"]]})
