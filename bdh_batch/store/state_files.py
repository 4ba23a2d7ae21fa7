"""The files of a store's states: written whole or not at all, encrypted where there is a key, readable while in use.

What is being written, and what is in use, lies in folders of the process that does it (`folders.py`). In plain, an
encrypted state lies there only.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bdh_batch.store.folders import LockedFolder
from bdh_batch.store.kept_files import KeptFiles
from bdh_batch.store.sealing import CHECK, Sealer, SealingFailed

PLAIN = ".safetensors"
SEALED = ".sealed"


@dataclass(frozen=True, slots=True)
class StateFile:
    """A state's file, which can be read until it is closed.

    Args:
        id: of the state.
        close: ends its use. Idempotent, and does not wait.
    """

    id: str
    path: Path
    close: Callable[[], object]


class StateFiles:
    """Keeps files by the ids of their states. Its methods raise OSError; `open` and `check_key` SealingFailed, too.

    Args:
        kept: where they are kept.
        work: a folder of this process's; in the file system of the folder, where they are kept in one.
        plain: for files in plain; `work`, where they are not encrypted.
    """

    def __init__(self, kept: KeptFiles, work: LockedFolder, plain: LockedFolder, sealer: Sealer | None) -> None:
        self._kept = kept
        self._work = work
        self._plain = plain
        self._sealer = sealer
        self._suffix = PLAIN if sealer is None else SEALED

    def to_write(self, id: str) -> Path:
        """Where a new state is to be written."""
        return self._plain.path / f"{id}{PLAIN}"

    def begin(self, id: str) -> BinaryIO:
        """A file for a new state, to be written in pieces."""
        return self.to_write(id).open("xb")

    def prepare(self, id: str) -> int:
        """Makes a file that was written ready to be kept. Returns its bytes."""
        ready = self._ready(id)
        if self._sealer is not None:
            with self.to_write(id).open("rb") as plain, ready.open("wb") as sealed:
                self._sealer.seal_file(plain, sealed, id.encode())
                sealed.flush()
                os.fsync(sealed.fileno())
        return ready.stat().st_size

    def upload(self, id: str) -> None:
        """Brings a file that is ready to where files are kept, if that takes long."""
        self._kept.upload(self._ready(id), self._name(id))

    def keep(self, id: str) -> None:
        """Moves a file that is ready, and was uploaded, to those that are kept."""
        self._kept.keep(self._ready(id), self._name(id))

    def discard(self, id: str) -> None:
        """Removes a file that was written and is not kept. Idempotent."""
        for path in {self.to_write(id), self._ready(id)}:
            path.unlink(missing_ok=True)

    def remove(self, id: str) -> None:
        """Removes a file that is kept. Idempotent."""
        self._kept.remove(self._name(id))

    @staticmethod
    def close_opened(path: Path | None) -> None:
        """Removes a file that `open` has given. Idempotent."""
        if path is not None:
            path.unlink(missing_ok=True)

    def open(self, id: str) -> Path | None:
        """A file of this process's with a state; None where it is not kept (any more)."""
        name = f"{id}-{uuid.uuid4().hex}"
        fetched, used = self._work.path / f"{name}{self._suffix}", self._plain.path / f"{name}{PLAIN}"
        try:
            self._kept.fetch(self._name(id), fetched)
            if self._sealer is not None:
                with fetched.open("rb") as sealed, used.open("xb") as plain:
                    for frame in self._sealer.open_file(sealed, id.encode()):
                        plain.write(frame)
        except FileNotFoundError:
            used.unlink(missing_ok=True)
            return None
        except BaseException:
            used.unlink(missing_ok=True)
            raise
        finally:
            if fetched != used:
                fetched.unlink(missing_ok=True)
        return used

    @staticmethod
    def opened_id(path: str) -> str:
        """The id of the state whose file `open` has given."""
        return Path(path).name.partition("-")[0]

    def key_check(self) -> bytes:
        """What tells, at the next start, whether the key is the same."""
        return b"" if self._sealer is None else self._sealer.seal(CHECK, CHECK)

    def check_key(self, check: bytes) -> None:
        """Raises SealingFailed unless the store was written with the key, or the lack of one, that there is now."""
        if self._sealer is None:
            if check:
                raise SealingFailed("The store is encrypted: its key is needed.")
        elif not check:
            raise SealingFailed("The store is not encrypted: it cannot be opened with a key.")
        else:
            self._sealer.open(check, CHECK)

    def close(self) -> None:
        """Removes what lies in the process's folders. Idempotent."""
        self._work.remove()
        if self._plain is not self._work:
            self._plain.remove()

    def _ready(self, id: str) -> Path:
        return self._work.path / self._name(id)

    def _name(self, id: str) -> str:
        return f"{id}{self._suffix}"


def finish(file: BinaryIO) -> None:
    """Makes the content of a file durable, and closes it."""
    with file:
        file.flush()
        os.fsync(file.fileno())
