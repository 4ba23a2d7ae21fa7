"""Callers: an API key, or, where none is required or given, an address; and what they may do."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from bdh_batch.http.auth.keys import Key
from bdh_batch.http.errors import Forbidden

UNIX = "unix"  # clients of a Unix socket have no address; in lists of networks, all of them
KEY_HEADER = "x-api-key"
NETWORK_BITS = 64  # of an IPv6 address: what is behind them is one customer's, who can take any of the rest


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sends a request: the owner of an API key, or an address.

    `label` is opaque, the same for all requests of one key or address, and neither of them.
    """

    label: str
    key: Key | None = None
    is_local: bool = False  # whether it is a program of this machine

    @property
    def namespace(self) -> str:
        """The namespace of cached prefixes that its requests share; callers without keys have one in common."""
        return self.label if self.key is not None else ""

    @property
    def owner(self) -> str:
        """Whose what it stores is: its key's, or without one its address's. The programs of this machine are one."""
        return "@local" if self.key is None and self.is_local else self.label

    @property
    def weight(self) -> float | None:
        return None if self.key is None else self.key.weight

    @property
    def is_operator(self) -> bool:
        """Whether it may load and unload models, and see engine processes: by its key, or, where no keys are asked for,
        as a program of this machine."""
        return self.is_local if self.key is None else bool(self.key.operator)

    def check_operator(self) -> None:
        """Raises Forbidden unless it is an operator."""
        if not self.is_operator:
            text = (
                "This API key is not an operator's." if self.key else "Without API keys, only the server's machine may."
            )
            raise Forbidden(text, "model")

    def may_use(self, names: Collection[str]) -> bool:
        """Whether a model of these names is among its own."""
        return self.key is None or self.key.models is None or not set(names).isdisjoint(self.key.models)

    def check_model(self, name: str, names: Collection[str]) -> None:
        """Raises Forbidden unless it may use the model that it asked for as `name`."""
        if not self.may_use(names):
            raise Forbidden(f"This API key does not have access to the model {name!r}.", "model")

    def check_priority(self, priority: int, least: int) -> None:
        """Raises Forbidden where it may not go before others so far: by its key's right, or, without one, `least`."""
        own = None if self.key is None else self.key.top_priority
        if priority >= (least if own is None else own):
            return
        if own is None:
            text = f"Without a top_priority of the key, a priority is at least {least} (scheduler.top_priority)"
        else:
            text = f"With this key, a priority is at least {own} (its top_priority)"
        raise Forbidden(f"{text}, not {priority}.", "priority")


def by_key(key: Key) -> Caller:
    return Caller(key.id, key)


def by_address(scope: Scope) -> Caller:
    client = scope.get("client")
    return at_address(client[0] if client else "")


def at_address(address: str) -> Caller:
    return Caller("@" + hashlib.sha256(network_of(address).encode()).hexdigest()[:16], is_local=_is_loopback(address))


def _is_loopback(address: str) -> bool:
    if address in ("", UNIX):
        return True
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(known, "ipv4_mapped", None) or known).is_loopback


def bearer(scope: Scope) -> str:
    """The key that a request carries, in the header of OpenAI's clients or of Anthropic's, or an empty string where it
    carries none or several."""
    headers = Headers(scope=scope)
    authorization, keys = headers.getlist("authorization"), headers.getlist(KEY_HEADER)
    if len(authorization) > 1 or len(keys) > 1:
        return ""
    given = {key_in(authorization), *(key.strip() for key in keys)} - {""}
    return given.pop() if len(given) == 1 else ""


def key_in(given: Sequence[str]) -> str:
    """The key in the values of `authorization`, or an empty string where there is none, or several."""
    scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def network_of(address: str) -> str:
    """What one client can call itself by: its IPv4 address, or its IPv6 network."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address  # a proxy's own word for it
    if isinstance(known, ipaddress.IPv4Address):
        return str(known)
    if known.ipv4_mapped is not None:
        return str(known.ipv4_mapped)
    return str(ipaddress.ip_network((int(known), NETWORK_BITS), strict=False))
