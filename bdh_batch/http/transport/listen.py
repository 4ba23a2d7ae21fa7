"""The sockets that a server listens at: a host's addresses, a path, or what a service manager hands over."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from bdh_batch.errors import ConfigError
from bdh_batch.settings import Server as ServerSettings

log = logging.getLogger(__name__)

BACKLOG = 2048
FIRST_HANDED = 3  # the file descriptor of the first socket that systemd hands over (sd_listen_fds(3))
HANDED = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
TRIES = 8  # to find a free port that is free at all addresses of a name
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine has no such address, as where IPv6 is turned off


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Sockets whose addresses are taken before the slow part of the start.

    Raises:
        ConfigError: they cannot be opened.
    """
    if handed := handed_over():
        return handed
    if settings.uds is not None:
        return [bind_path(settings.uds, int(settings.uds_mode, 8))]
    addresses = _addresses(settings.host, settings.port)
    for last in (*([False] * (TRIES - 1 if settings.port == 0 else 0)), True):
        try:
            return _bind_all(addresses, settings.host, settings.port)
        except _PortTaken as taken:
            if last:
                raise taken.error from None
    raise AssertionError


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at the first address of `host`. Raises ConfigError: it cannot be opened."""
    try:
        return _bind(*_addresses(host, port)[0], alone=True)
    except OSError as error:
        raise _refusal(host, port, error) from error


def handed_over() -> list[socket.socket]:
    """The listening sockets that systemd opened for this process, if it did.

    Raises:
        ConfigError: what it handed over is no listening socket.
    """
    count, pid = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_PID", "")
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    for name in HANDED:
        os.environ.pop(name, None)  # they are not for our children
    sockets = []
    for descriptor in range(FIRST_HANDED, FIRST_HANDED + int(count)):
        try:
            handed = socket.socket(fileno=descriptor)
            if not handed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or handed.type != socket.SOCK_STREAM:
                raise OSError(errno.EINVAL, "it is no stream socket that listens")
        except OSError as error:
            raise ConfigError(f"LISTEN_FDS: descriptor {descriptor} cannot be used ({error.strerror})") from error
        os.set_inheritable(descriptor, False)
        handed.setblocking(False)
        sockets.append(handed)
    return sockets


def bind_path(path: Path, mode: int) -> socket.socket:
    """A Unix socket that listens at `path`. One that a dead server has left there is replaced.

    Raises:
        ConfigError: it cannot be opened, or another server listens there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        before = os.umask(0o777 & ~mode)  # never open to more than it is meant to be
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"server.uds: cannot listen at {path} ({error.strerror or error})") from error
    listener.setblocking(False)
    return listener


def release(listener: socket.socket, settings: ServerSettings) -> None:
    """Closes the socket, and removes its file, if `listen` made one."""
    path = settings.uds
    if path is not None and listener.family == socket.AF_UNIX and listener.getsockname() == str(path):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    listener.close()


def url_of(listeners: Sequence[socket.socket], settings: ServerSettings) -> str:
    """Where a client on this machine finds the server."""
    first = listeners[0]
    if first.family == socket.AF_UNIX:
        return f"unix:{first.getsockname()}"
    host, port = first.getsockname()[:2]
    if len(listeners) > 1 and all(each.getsockname()[1] == port for each in listeners):
        host = settings.host
    elif ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if first.family == socket.AF_INET else "::1"
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def local_only(listeners: Sequence[socket.socket]) -> bool:
    """Whether none but this machine's own programs can connect, over its loopback addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    return all(
        listener.family in families and ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        for listener in listeners
    )


class _PortTaken(Exception):
    """Raised where a name's first address had a free port, and another one has not got that one free."""

    def __init__(self, error: ConfigError) -> None:
        self.error = error


_SocketName = tuple[str | int, ...]
_Address = tuple[int, _SocketName]  # a family, and an address of it


def _addresses(host: str, port: int) -> list[_Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"server.host: {host} has no address ({getattr(error, 'strerror', None) or error})"
        ) from error
    return list(dict.fromkeys((int(family), cast(_SocketName, address)) for family, _, _, _, address in found))


def _bind_all(addresses: Sequence[_Address], host: str, port: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    absent: OSError | None = None
    for family, (address, _, *rest) in addresses:
        chosen = listeners[0].getsockname()[1] if listeners else port
        try:
            listeners.append(_bind(family, (address, chosen, *rest), alone=len(addresses) == 1))
        except OSError as error:
            if error.errno in ABSENT:
                absent = error
                continue
            for listener in listeners:
                listener.close()
            refused = _refusal(host, chosen, error)
            if listeners and error.errno == errno.EADDRINUSE:
                raise _PortTaken(refused) from error
            raise refused from error
    if not listeners and absent is not None:
        raise _refusal(host, port, absent) from absent
    return listeners


def _bind(family: int, address: _SocketName, alone: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        listener.bind(address)
        listener.listen(BACKLOG)  # until one listens, Linux lets others bind the same address
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _refusal(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"server.port: cannot listen on {host}:{port} ({error.strerror or error})")


def _clear(path: Path) -> None:
    """Removes a socket at `path` at which no process listens. Raises OSError: there is something else."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.EEXIST, "there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another server listens there")
