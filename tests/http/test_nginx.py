"""Behind nginx as Debian has it: what a client gets through the proxy is what it would get without it."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from bdh_batch.http.auth.keys import KeyFile, new_key
from tests.conftest import CONFORMANCE, HANG_SECONDS, LONG_NAME, eventually, free_port
from tests.http.raw import Raw, ask, get, post

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
pytestmark = pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed: apt-get install nginx-light")

KEY = "key-of-the-tests"
SHORT = {"prompt": "a", "max_tokens": 3, "seed": 1}
# Each of its frames fills a buffer of nginx: it passes on every one, and soon sees that its client has gone.
ENDLESS = {"prompt": "a", "max_tokens": 100_000, "stream": True, "model": LONG_NAME}
LARGE = json.dumps(SHORT | {"prompt": "a" * 3_000_000}).encode()  # more than the buffers of all sockets on its way
TOO_LARGE = json.dumps(SHORT | {"prompt": "a" * 5_000_000}).encode()
# What is asked for, and with which headers and body; and the status of the refusal, most before the body is read.
REFUSED: list[tuple[int, str, dict[str, str], bytes]] = [
    (401, "/v1/completions", {"authorization": "Bearer wrong"}, LARGE),
    (404, "/v1/nothing", {}, LARGE),
    (405, "/v1/models", {}, LARGE),
    (413, "/v1/completions", {}, TOO_LARGE),
    (415, "/v1/completions", {"content-type": "text/plain"}, LARGE),
    (415, "/v1/completions", {"content-encoding": "br"}, LARGE),
    (429, "/v1/completions", {"authorization": "Bearer limited"}, LARGE),
    (400, "/v1/completions", {}, b'{"prompt": 5}'),
    (404, "/v1/completions", {}, b'{"prompt": "a", "model": "other"}'),
]
# Name of a site to what its location says beside proxy_pass. The first is nginx's default: HTTP/1.0 with
# `Connection: close` up to 1.29.6, and bodies and responses that are buffered.
SITES = {
    "default": "proxy_pass http://127.0.0.1:{port};",
    "kept": 'proxy_pass http://kept; proxy_http_version 1.1; proxy_set_header Connection "";',
    "unbuffered": "proxy_pass http://127.0.0.1:{port}; proxy_request_buffering off;",
}
CONFIG = """
daemon off;
user {user};
worker_processes 1;
pid {folder}/pid;
error_log {folder}/log info;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 64m;
    upstream kept {{ server 127.0.0.1:{port}; keepalive 4; }}
    {servers}
}}
"""


@dataclass(frozen=True)
class Site:
    """One of nginx's servers, as its clients see it."""

    name: str
    port: int


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def limited_keys(keys: KeyFile) -> list[str]:
    """Keys that may make one request a minute: each is for one case, as a minute may pass from one to the next."""
    limit = {"requests_per_minute": 1}
    return [keys.add(partial(new_key, name=f"limited-{number}", rights=limit)) for number in range(len(SITES))]


@pytest.fixture(scope="module")
def backend(serve: ServeFactory, keys: KeyFile, limited_keys: list[str]) -> Iterator[Server]:
    """Answers one sequence at a time, and sends a comment to those who wait."""
    options = ("auth.enabled=true", f"auth.api_keys={KEY}", f"auth.api_keys_file={keys.path}")
    one_by_one = ("scheduler.max_running=1", "server.sse_keepalive_seconds=0.1")
    with serve(*options, *one_by_one, f"model.aliases={LONG_NAME}", model=CONFORMANCE / "tiny") as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def sites(backend: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    """An nginx in front of `backend`, by the names of SITES."""
    folder = tmp_path_factory.mktemp("nginx")
    found = {name: Site(name, free_port()) for name in SITES}
    servers = [
        f"server {{ listen 127.0.0.1:{found[name].port}; location / {{ {location.format(port=backend.port)} }} }}"
        for name, location in SITES.items()
    ]
    config = folder / "nginx.conf"
    config.write_text(
        CONFIG.format(folder=folder, user=getpass.getuser(), port=backend.port, servers="\n    ".join(servers))
    )
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen([NGINX, "-p", folder, "-c", config], stdout=output, stderr=output)
    try:
        eventually((folder / "pid").exists, what=(folder / "output").read_text)
        yield found
        assert process.poll() is None, (folder / "log").read_text()
    finally:
        process.terminate()
        process.wait(HANG_SECONDS)


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest, sites: dict[str, Site]) -> Site:
    return sites[request.param]


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    bearer = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{site.port}", headers=bearer, timeout=HANG_SECONDS) as client:
        yield client


def test_events_come_while_the_response_is_made(backend: Server, client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = response.iter_lines()
        assert any(line.startswith("data: ") for line in lines)
        assert backend.metrics()["bdh_num_requests_running"] == 1
    backend.until_idle()  # nginx passes on that its client has gone


def test_what_is_written_comes_at_once(backend: Server, client: httpx.Client) -> None:
    """While a request waits, comments are all that is written: far less than nginx holds back where it buffers."""
    with contextlib.ExitStack() as running:
        first = running.enter_context(backend.http.stream("POST", "/v1/completions", json=ENDLESS))
        response = first.iter_lines()  # held on to: with it, the connection would end
        next(response)
        with client.stream("POST", "/v1/completions", json=SHORT | {"stream": True}) as second:
            lines = second.iter_lines()
            assert [next(lines) for _ in range(6)] == [": keep-alive", ""] * 3
            running.close()
            events = [line for line in lines if line.startswith("data: ")]
    assert events.pop() == "data: [DONE]"
    assert "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events) == backend.text(
        **SHORT
    )


@pytest.mark.parametrize(("status", "path", "headers", "body"), REFUSED)
def test_a_refusal_keeps_its_status_and_its_body(
    backend: Server,
    client: httpx.Client,
    limited_keys: list[str],
    status: int,
    path: str,
    headers: dict[str, str],
    body: bytes,
) -> None:
    if status == 429:
        headers = {"authorization": f"Bearer {limited_keys.pop()}"}
        backend.http.post("/v1/completions", json=SHORT, headers=headers)
    of_nginx = client.post(path, content=body, headers=headers)
    direct = backend.http.post(path, content=body, headers=headers)
    assert without_numbers(backend.error(of_nginx, status)) == without_numbers(backend.error(direct, status))
    # On a connection of its own: where nginx does not buffer bodies, it ends the connection of a client whose body it
    # had not read whole when the response was there, and says nothing of it in the response.
    with httpx.Client(base_url=client.base_url, headers=client.headers, timeout=HANG_SECONDS) as another:
        assert another.post("/v1/completions", json=SHORT).status_code == 200


def test_a_connection_to_nginx_is_kept(backend: Server, site: Site) -> None:
    """Also after a refusal: the connection behind it may end, this one does not."""
    bearer = f"authorization: Bearer {KEY}"
    expected = backend.text(**SHORT)
    proxy = Raw(site)
    for _ in range(5):
        for request in (get("/health"), post(SHORT, bearer), post(SHORT), post(SHORT | {"stream": True}, bearer)):
            proxy.socket.sendall(request)
        health, whole, refused, stream = (proxy.response() for _ in range(4))
        assert [health.status, whole.status, refused.status, stream.status] == [200, 200, 401, 200]
        assert json.loads(whole.body)["choices"][0]["text"] == expected
        assert stream.body.endswith(b"data: [DONE]\n\n")
    proxy.close()


def test_a_connection_from_nginx_is_kept_where_it_asks_for_that(backend: Server, sites: dict[str, Site]) -> None:
    for status, headers in ((200, [f"authorization: Bearer {KEY}"]), (401, [])) * 5:
        assert ask(sites["kept"], post(SHORT, *headers)).status == status
    of_the_test = 1
    backend.until(lambda m: m["bdh_http_connections"] == of_the_test + 1)


def without_numbers(error: dict[str, object]) -> str:
    """An error may say how long to wait."""
    return re.sub("[0-9]+", "N", json.dumps(error))
