"""What a server may be called. A web page on a name of its own that points to this machine (DNS rebinding) is, to the
browser, of the same origin as this server, and could use it; the name is what gives it away.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bdh_batch.http.errors import HostRefused, error_response

ANY = "*"
# Names that only this machine or its own network can give away; Ollama's list, and home.arpa of RFC 8375.
PRIVATE_DOMAINS = ("localhost", "local", "internal", "home.arpa")
PORT = re.compile(r":[0-9]*\Z")


class AllowedHosts:
    """Refuses requests by the name in their Host header.

    Args:
        names: exact names, or `*.domain`; None is what no web page from elsewhere can be called.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] | None) -> None:
        self._app = app
        self._names = None if names is None else [name.lower() for name in names]
        self._own_name = socket.gethostname().lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host")
        if scope["type"] == "http" and host is not None and not self.allows(host):
            text = f"The host {PORT.sub('', host)} is not allowed (server.allowed_hosts lists those that are)."
            await error_response(HostRefused(text))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def allows(self, host: str) -> bool:
        """Whether `host`, a name or an address, perhaps with a port, is one of ours."""
        name = PORT.sub("", host).rstrip(".").lower()
        if self._names is None:
            return self._is_ours(name)
        return any(
            name == known or known == ANY or (known.startswith("*.") and name.endswith(known[1:]))
            for known in self._names
        )

    def _is_ours(self, name: str) -> bool:
        return (
            "." not in name.rstrip(".")  # [::1] has none, either
            or _is_address(name)
            or name == self._own_name
            or any(name.endswith(f".{domain}") for domain in PRIVATE_DOMAINS)
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
