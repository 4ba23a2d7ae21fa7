"""Where a server listens, and by which names it may be called."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from bdh_batch.errors import ConfigError
from bdh_batch.http.auth.hosts import AllowedHosts
from bdh_batch.http.transport.listen import listen, local_only, release, url_of
from bdh_batch.settings import Server as Settings, load
from tests.conftest import eventually

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
ADDRESSES = {
    "127.0.0.1": ([socket.AF_INET], "http://127.0.0.1:{}"),
    "0.0.0.0": ([socket.AF_INET], "http://127.0.0.1:{}"),
    "::": ([socket.AF_INET6], "http://[::1]:{}"),
    "::1": ([socket.AF_INET6], "http://[::1]:{}"),
    "both": ([socket.AF_INET6, socket.AF_INET], "http://both:{}"),
}
HAS_IPV6 = Path("/proc/net/if_inet6").exists()


@pytest.mark.parametrize("host", ADDRESSES)
def test_a_server_listens_at_all_addresses_of_its_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ":" in host and not HAS_IPV6:
        pytest.skip("this machine has no IPv6")
    settings = Settings(host=host, port=0)
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", named_both(socket.getaddrinfo))
        listeners = listen(settings)
    families, url = ADDRESSES[host]
    if not HAS_IPV6:  # what is absent is left out
        families = [family for family in families if family == socket.AF_INET]
        url = url.replace("both", "127.0.0.1")
    try:
        assert [listener.family for listener in listeners] == families
        (port,) = {listener.getsockname()[1] for listener in listeners}
        assert url_of(listeners, settings) == url.format(port)
        assert local_only(listeners) == (host not in ("0.0.0.0", "::"))
        for listener in listeners:
            address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.getsockname()[0], listener.getsockname()[0])
            socket.create_connection((address, port), timeout=300).close()
    finally:
        for listener in listeners:
            listener.close()


def named_both(getaddrinfo: object) -> object:
    """As `localhost` is in most machines' hosts file."""

    def found(host: str, port: int, **more: object) -> object:
        if host != "both":
            return getaddrinfo(host, port, **more)  # type: ignore[operator]
        kind = (socket.SOCK_STREAM, 6, "")
        return [(socket.AF_INET6, *kind, ("::1", port, 0, 0)), (socket.AF_INET, *kind, ("127.0.0.1", port))] * 2

    return found


def test_a_host_without_an_address_is_refused_by_name() -> None:
    for host in ("no-such-host.invalid", "a" * 300):
        with pytest.raises(ConfigError, match=r"server\.host"):
            listen(Settings(host=host))


class TestUnixSocket:
    def test_has_its_mode_and_ends_with_the_server(self, tmp_path: Path) -> None:
        settings = Settings(uds=tmp_path / "s", uds_mode="600")
        (listener,) = listen(settings)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
        assert url_of([listener], settings) == f"unix:{tmp_path}/s"
        assert not local_only([listener])
        with pytest.raises(ConfigError, match=r"server\.uds.*another server listens there"):
            listen(settings)
        release(listener, settings)
        assert not (tmp_path / "s").exists()

    def test_that_a_dead_server_left_is_replaced_and_no_other_file_is(self, tmp_path: Path) -> None:
        settings = Settings(uds=tmp_path / "s")
        listen(settings)[0].close()
        (listener,) = listen(settings)
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
        release(listener, settings)
        (tmp_path / "s").write_text("mine")
        with pytest.raises(ConfigError, match=r"server\.uds.*no socket"):
            listen(settings)
        assert (tmp_path / "s").read_text() == "mine"

    @pytest.mark.parametrize("path", ["/nowhere/s", "/" + "a" * 200])
    def test_that_cannot_be_is_refused(self, path: str) -> None:
        with pytest.raises(ConfigError, match=r"server\.uds"):
            listen(Settings(uds=Path(path)))

    @pytest.mark.parametrize(("given", "mode"), [(660, "660"), ("0o640", "640"), ("0600", "0600")])
    def test_has_a_mode_in_octal(self, given: object, mode: str) -> None:
        assert load(overrides=[("server.uds_mode", given)]).settings.server.uds_mode == mode
        for wrong in ("rw", "888", 7, "66666"):
            with pytest.raises(ConfigError, match=r"server\.uds_mode"):
                load(overrides=[("server.uds_mode", wrong)])

    def test_serves(self, serve: ServeFactory, tmp_path: Path) -> None:
        path = tmp_path / "bdh.sock"
        with serve(f"server.uds={path}", "server.trusted_proxies=unix", model=TINY, wait=False) as server:
            eventually(lambda: "is ready at" in server.log, what=lambda: server.log)
            assert f"is ready at unix:{path}." in server.log
            assert f"curl -s http://localhost/v1/completions --unix-socket {path} " in server.log
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(transport=transport, base_url="http://localhost", timeout=300) as client:
                assert client.get("/health", headers={"host": "any.example.com"}).status_code == 200
                response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
                assert response.json()["usage"]["completion_tokens"] == 2
            server.terminate()
            assert server.exit_code() == 0
            assert not path.exists()


def test_sockets_of_a_service_manager_go_before_all_else(tmp_path: Path) -> None:
    """As systemd's LISTEN_FDS has it: from descriptor 3 on, for the process with that number alone."""
    code = """if True:
        import os, sys
        os.dup2(int(sys.argv[1]), 3)
        os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid() + int(sys.argv[2]))}
        from bdh_batch.http.transport.listen import listen, url_of
        from bdh_batch.settings import Server
        listeners = listen(Server(port=0))
        print(url_of(listeners, Server()), "LISTEN_FDS" in os.environ, os.get_inheritable(listeners[0].fileno()))
    """

    def reported(handed: socket.socket, other_process: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(handed.fileno()), str(other_process)]
        return subprocess.run(command, pass_fds=[handed.fileno()], capture_output=True, text=True, timeout=300)

    with socket.create_server(("127.0.0.1", 0)) as handed:
        url = f"http://127.0.0.1:{handed.getsockname()[1]}"
        assert reported(handed, 0).stdout.split() == [url, "False", "False"]
        assert url not in reported(handed, 1).stdout
    with socket.socket() as deaf:
        assert "LISTEN_FDS: descriptor 3" in reported(deaf, 0).stderr


class TestNames:
    OWN = (
        "localhost",
        "127.0.0.1:8000",
        "[::1]:8000",
        "10.1.2.3",
        "a",
        "bdh:8000",
        "Box.LOCAL",
        "api.localhost",
        "x.internal",
    )
    FOREIGN = (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.nip.io",
        "localhost.evil.example",
        "a.b",
        "1.2.3.4.5",
    )

    def test_that_a_web_page_cannot_have_are_allowed_at_first(self) -> None:
        hosts = AllowedHosts(nothing, None)
        assert [name for name in self.OWN if not hosts.allows(name)] == []
        assert [name for name in self.FOREIGN if hosts.allows(name)] == []

    def test_that_are_listed_are_all_there_are(self) -> None:
        hosts = AllowedHosts(nothing, ["api.example.com", "*.Example.org"])
        allowed = ("api.example.com", "API.example.com:443", "api.example.com.", "a.example.org", "a.b.example.org")
        assert all(map(hosts.allows, allowed))
        refused = ("example.org", "badexample.org", "localhost", "127.0.0.1", "", "api.example.com.evil.example")
        assert not any(map(hosts.allows, refused))

    def test_that_are_foreign_are_refused_by_a_server_of_this_machine_only(self, tiny: Server) -> None:
        for path in ("/", "/health", "/v1/models", "/nothing"):
            error = tiny.error(tiny.http.get(path, headers={"host": "evil.example"}), 403)
            assert error["code"] == "host_not_allowed"
            assert "server.allowed_hosts" in error["message"]


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("nothing is passed on here")
