"""Locks folders between processes, shared or exclusively, until the owner unlocks them or ends.

A lock is the kernel's (`flock`) on the folder itself: none is left behind by a crash, and it needs no lock file.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

MOST_TRIES = 100  # of locking a folder that other processes keep deleting


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` exclusively, after waiting for other processes; makes it where it is missing.

    Raises:
        OSError
    """
    handle = _lock(folder)
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked_if_free(folder: Path) -> Iterator[bool]:
    """Locks `folder` exclusively if no other process has it locked, and returns whether that worked."""
    try:
        handle = _open(folder)
    except OSError:
        yield False
        return
    try:
        yield _try(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


def share(folder: Path) -> int:
    """Locks `folder`, shared with other processes, until the descriptor that is returned is closed.

    Raises:
        FileNotFoundError: the folder is missing, or another process is about to delete it.
    """
    handle = _open(folder)
    if _try(handle, fcntl.LOCK_SH) and _is_there(handle, folder):
        return handle
    os.close(handle)
    raise FileNotFoundError(f"{folder} is being deleted")


def _lock(folder: Path) -> int:
    for _ in range(MOST_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = _open(folder)
        except FileNotFoundError:
            continue
        try:
            if not _try(handle, fcntl.LOCK_EX):
                log.warning("waiting for another process that uses %s", folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_there(handle, folder):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise OSError(f"{folder}: other processes keep deleting it")


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _try(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(handle: int, folder: Path) -> bool:
    """Returns whether the locked folder is still the one of this name: its last owner may have deleted it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False
