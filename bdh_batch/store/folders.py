"""Folders that belong to one process: locked as long as it lives, and removed by another one when it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LockedFolder:
    """A folder of this process's, which only its user can enter."""

    path: Path
    lock: int

    @classmethod
    def make(cls, parent: Path, prefix: str) -> LockedFolder:
        """Makes a new one. Raises OSError."""
        while True:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            lock = locked(path, fcntl.LOCK_SH)
            if lock is not None:  # else another process took it for an abandoned one, before it was locked
                return cls(path, lock)

    def remove(self) -> None:
        """Deletes it. Idempotent but for a second call after another folder was opened."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self.lock)


def locked(path: Path, how: int) -> int | None:
    """Locks a folder; returns the descriptor that holds the lock, or None where it is locked otherwise, or gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def is_alive(path: Path) -> bool:
    """Whether the process lives that has made this folder."""
    if (lock := locked(path, fcntl.LOCK_EX)) is None:
        return path.is_dir()
    os.close(lock)
    return False


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the folders of processes that were killed: those of this user that nobody has locked."""
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if path.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            if (lock := locked(path, fcntl.LOCK_EX)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def roomy_folder(size: int) -> Path:
    """Where a temporary folder of so many bytes goes: in memory that processes share, else where the system has such
    folders."""
    shared = Path("/dev/shm")
    with contextlib.suppress(OSError):
        status = os.statvfs(shared)
        if status.f_bavail * status.f_frsize >= size and os.access(shared, os.W_OK | os.X_OK):
            return shared
    return Path(tempfile.gettempdir())
