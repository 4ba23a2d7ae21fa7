"""Opens the store of the settings: its folder, its key, its database."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path

from bdh_batch.errors import ConfigError
from bdh_batch.settings import Store as Chosen
from bdh_batch.store.database import Database
from bdh_batch.store.folders import LockedFolder, remove_abandoned, roomy_folder
from bdh_batch.store.record import StoreLimits
from bdh_batch.store.records import Store
from bdh_batch.store.sealing import Sealer, SealingFailed, sealer_of
from bdh_batch.store.state_files import StateFiles

TEMPORARY, PLAIN = "bdh-batch-store-", "bdh-batch-plain-"  # how folders in the system's temporary folder begin
LONGEST_KEY = 4096  # bytes of a key's file


def temporary_folder(chosen: Chosen) -> LockedFolder:
    """Makes the folder of a store that ends with its server, and removes those of servers that were killed.

    Raises:
        ConfigError
    """
    parent = roomy_folder(chosen.max_bytes)
    try:
        remove_abandoned(parent, TEMPORARY)
        return LockedFolder.make(parent, TEMPORARY)
    except OSError as error:
        raise ConfigError(f"store.path: {parent}: no temporary folder can be made there ({error})") from error


def open_store(chosen: Chosen, clock: Callable[[], float] = time.time) -> Store:
    """Opens a store, and removes what processes that were killed have left of it.

    Raises:
        ConfigError: it cannot be read or written, is damaged, or another key encrypted it.
    """
    sealer = _sealer(chosen)
    temporary = temporary_folder(chosen) if chosen.path is None else None
    path = chosen.path if temporary is None else temporary.path
    assert path is not None
    try:
        files = _open_files(path, sealer, chosen.max_state_bytes)
        try:
            limits = StoreLimits(chosen.max_records, chosen.max_bytes, chosen.max_bytes_per_key)
            database = Database(_own(path / "records.sqlite3"), files, limits, sealer)
        except BaseException:
            files.close()
            raise
    except SealingFailed as error:
        raise ConfigError(f"store.encryption_key: {path}: {error}") from error
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"store.path: {path}: the store cannot be opened ({error})") from error

    def close() -> None:
        files.close()
        if temporary is not None:
            temporary.remove()

    return Store(database, files, chosen.ttl_seconds, close, clock)


def _open_files(path: Path, sealer: Sealer | None, room: int) -> StateFiles:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & stat.S_IWOTH:
        raise PermissionError(f"any user may write to {path}: chmod o-w")
    states, parent = path / "states", path / "work"
    for folder in (states, parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    remove_abandoned(parent, "")
    work = LockedFolder.make(parent, "")
    if sealer is None:
        return StateFiles(states, work, work, None)
    elsewhere = roomy_folder(room)
    remove_abandoned(elsewhere, PLAIN)
    return StateFiles(states, work, LockedFolder.make(elsewhere, PLAIN), sealer)


def _own(path: Path) -> Path:
    """A file that only its user can read, as those that SQLite puts beside it then are."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return path


def _sealer(chosen: Chosen) -> Sealer | None:
    """Raises ConfigError."""
    key, file = chosen.encryption_key, chosen.encryption_key_file
    if key is not None and file is not None:
        raise ConfigError("store.encryption_key_file: store.encryption_key is set, too: leave one of them out")
    if key is not None:
        return sealer_of(key.get_secret_value())
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            return sealer_of(opened.read(LONGEST_KEY).decode("ascii", "replace"))
    except OSError as error:
        raise ConfigError(f"store.encryption_key_file: {error}") from error
