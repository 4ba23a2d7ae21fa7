"""Where the files of states are kept: a folder, or an object store that servers share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from bdh_batch.errors import ConfigError
from bdh_batch.settings import without_password
from bdh_batch.store.calls import said
from bdh_batch.system.durable import sync_folder

PROBE = "probe"  # a file without content, which is there for a moment

LOCAL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})  # errors of a disk of this machine

# Options of file systems, by protocol. S3's gets a limit for each request, as others have limits of their own, and one
# part of a file in memory at a time. It tries again by itself, and need not do so twice over.
OPTIONS: dict[str, Callable[[float], dict[str, Any]]] = {
    "s3": lambda seconds: {
        "max_concurrency": 1,
        "config_kwargs": {
            "connect_timeout": math.ceil(seconds),
            "read_timeout": math.ceil(seconds),
            "retries": {"max_attempts": 0},
        },
    },
    "file": lambda seconds: {"auto_mkdir": True},
}


class ObjectStoreFailed(OSError):
    """An object store does not do what it was asked for. Raised to `Calls`, which makes it Unreachable."""


class KeptFiles(Protocol):
    """Keeps files by name. All methods raise OSError."""

    def upload(self, ready: Path, name: str) -> None:
        """Begins to keep a file, where that takes long."""

    def keep(self, ready: Path, name: str) -> None:
        """Has it kept. It does not take long."""

    def fetch(self, name: str, to: Path) -> None:
        """Makes a new file of one that is kept. Raises FileNotFoundError, too."""

    def remove(self, name: str) -> None:
        """Removes one. Idempotent."""


class KeptFolder:
    """Keeps files in a folder, in the same file system as those that come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def upload(self, ready: Path, name: str) -> None:
        """There is nothing to do yet."""

    def keep(self, ready: Path, name: str) -> None:
        ready.rename(self._folder / name)
        sync_folder(self._folder)

    def fetch(self, name: str, to: Path) -> None:
        os.link(self._folder / name, to)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The names of all files that are kept."""
        return [path.name for path in self._folder.iterdir()]


class KeptObjects:
    """Keeps files in what fsspec has a file system for: S3, Google Cloud Storage, Azure and others.

    Args:
        url: of a folder or prefix, as in s3://bucket/states.
        request_seconds: that one request of the file system may take, where that can be said.
        seconds: that one of the methods may take, where the file system's calls can be cut off.

    Raises:
        ConfigError: the URL is none, a package is missing, there is no response, or files cannot be written there.
    """

    def __init__(self, url: str, request_seconds: float, seconds: float) -> None:
        protocol = url.partition("://")[0]
        try:
            import fsspec
        except ImportError as error:
            extra = "s3" if protocol == "s3" else "shared-store"
            text = f"an object store needs a package: pip install 'bdh-batch[{extra}]'"
            raise ConfigError(f"store.states_url: {text}") from error
        shown = without_password(url)
        try:
            make = OPTIONS.get(protocol)
            options = {} if make is None else make(request_seconds)
            self._files, self._root = fsspec.url_to_fs(url, skip_instance_cache=True, **options)
        except ImportError as error:
            raise ConfigError(f"store.states_url: {shown} needs a package ({said(error)})") from error
        except (ValueError, OSError) as error:
            raise ConfigError(f"store.states_url: {shown} is no folder of an object store ({said(error)})") from error
        self._seconds = seconds
        try:
            self.ping()
        except OSError as error:
            raise ConfigError(f"store.states_url: {shown} cannot be used ({said(error)})") from error

    def ping(self) -> None:
        """Raises ObjectStoreFailed: it does not respond, or a file cannot be written, removed, and found missing."""
        with _failures():
            self._call("pipe_file", self._path(PROBE), b"")
            with contextlib.suppress(FileNotFoundError):  # another server has removed it
                self._call("rm_file", self._path(PROBE))
            self._files.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                self._call("info", self._path(PROBE))

    def upload(self, ready: Path, name: str) -> None:
        with _failures():
            self._call("put_file", str(ready), self._path(name))
        ready.unlink()

    def keep(self, ready: Path, name: str) -> None:
        """It is there."""

    def fetch(self, name: str, to: Path) -> None:
        try:
            with _failures(FileNotFoundError):
                self._call("get_file", self._path(name), str(to))
        except FileNotFoundError:
            self.ping()  # that is said of a bucket that is gone, too, with all that may come back
            raise

    def remove(self, name: str) -> None:
        try:
            with _failures(FileNotFoundError):
                self._call("rm_file", self._path(name))
        except FileNotFoundError:
            self.ping()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _call(self, method: str, *given: object) -> None:
        """Calls a method of the file system, which has ended when this returns or raises: it is cut off where it takes
        too long. Those of one without coroutines cannot be."""
        if not self._files.async_impl:
            getattr(self._files, method)(*given)
            return
        coroutine = getattr(self._files, f"_{method}")  # as fsspec names them

        async def within() -> None:
            async with asyncio.timeout(self._seconds):
                await coroutine(*given)

        asyncio.run_coroutine_threadsafe(within(), self._files.loop).result()


@contextlib.contextmanager
def _failures(*but: type[Exception]) -> Iterator[None]:
    """What a file system raises is of its library's kind: that of Amazon, of an HTTP client, or of the system. What is
    wrong with this machine's disk passes, as nothing is wrong with the object store then."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        # S3's says EIO of what it does not know, and has that as the cause.
        if isinstance(error, OSError) and error.errno in LOCAL and error.__cause__ is None:
            raise
        raise ObjectStoreFailed(f"{type(error).__name__}: {error}") from error
