"""Copies and hashes files for the registry, and writes them through to the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import shown
from bdh_batch.system.durable import sync_folder
from bdh_batch.system.sizes import size_text

CHUNK = 2**20  # bytes
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete file that is not yet part of the registry; it is moved there, or deleted with its folder."""

    path: Path
    sha256: str
    size: int  # bytes


class Allowance:
    """Counts how many bytes a model may still add to the registry."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.left = most

    def check(self, size: int, name: str) -> None:
        """Checks that a file of `size` bytes is within the limit.

        Raises:
            CheckpointError: it is not.
        """
        if size > self.left:
            text = f"with it the model has more than {size_text(self.most)} (--max-size)"
            raise CheckpointError(f"{shown(name)} is too large: {text}")

    def take(self, size: int) -> None:
        """Counts a file of `size` bytes."""
        self.left -= size


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns an `OSError` into a `CheckpointError` of one line that says what is wrong."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in FULL:
            raise CheckpointError(f"{folder}: there is no room for the model ({reason})") from error
        raise CheckpointError(f"{error.filename or folder}: cannot be used ({shown(reason)})") from error


def check_room(folder: Path, size: int) -> None:
    """Checks that a file of `size` bytes fits the disk.

    Raises:
        CheckpointError: the disk of `folder` has fewer bytes left.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        text = f"there is no room for the model: {size_text(size)} are needed, and {size_text(free)} are free"
        raise CheckpointError(f"{folder}: {text}")


def copy(source: Path, target: Path, allowance: Allowance) -> Staged:
    """Copies a file and hashes what was written, even if the source changes meanwhile."""
    size, digest = source.stat().st_size, hashlib.sha256()
    allowance.check(size, source.name)
    check_room(target.parent, size)
    written = 0
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(CHUNK):
            written += len(chunk)
            allowance.check(written, source.name)
            writing.write(chunk)
            digest.update(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    return Staged(target, digest.hexdigest(), written)


def hash_of(file: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Writes a small file whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.parent)
