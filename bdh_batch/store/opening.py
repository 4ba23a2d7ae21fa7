"""Opens the store of the settings: its folder, its key, its database, and where its files are kept."""

from __future__ import annotations

import stat
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from bdh_batch.errors import ConfigError
from bdh_batch.settings import Store as Chosen, without_password
from bdh_batch.store.calls import Calls, StoreCalls, said
from bdh_batch.store.circuit import Circuit
from bdh_batch.store.database import Database, Driver
from bdh_batch.store.folders import LockedFolder, remove_abandoned, roomy_folder
from bdh_batch.store.kept_files import KeptFolder, KeptObjects, ObjectStoreFailed
from bdh_batch.store.postgresql import Postgresql
from bdh_batch.store.presence import InDatabase, InFolder, Presence
from bdh_batch.store.record import StoreLimits
from bdh_batch.store.records import Store
from bdh_batch.store.sealing import Sealer, SealingFailed, sealer_of
from bdh_batch.store.sqlite import Sqlite
from bdh_batch.store.state_files import StateFiles
from bdh_batch.store.temporary import temporary_folder

PLAIN = "bdh-batch-plain-"  # how folders in the system's temporary folder begin
LONGEST_KEY = 4096  # bytes of a key's file
FILE_THREADS = 4
TRANSFER = 4  # times as long as the database may a file take on its way from or to an object store


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
        kept = _kept(chosen, path)
        work = _own_folder(path)
        files = StateFiles(kept, work, work if sealer is None else _plain_folder(chosen), sealer)
        try:
            driver, presence = _driver(chosen, path, work)
            limits = StoreLimits(chosen.max_records, chosen.max_bytes, chosen.max_bytes_per_key)
            own = kept if isinstance(kept, KeptFolder) and chosen.url is None else None
            database = Database(driver, files, limits, sealer, own)
            presence.beat()
        except BaseException:
            files.close()
            raise
    except SealingFailed as error:
        raise ConfigError(f"store.encryption_key: {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"store.path: {path}: the store cannot be opened ({error})") from error
    except SQLAlchemyError as error:
        where = f"store.path: {path}" if chosen.url is None else f"store.url: {without_password(chosen.url)}"
        raise ConfigError(f"{where}: the store cannot be opened ({said(error)})") from error

    def close() -> None:
        files.close()
        if temporary is not None:
            temporary.remove()

    calls = _calls(chosen, database, kept)
    return Store(database, files, presence, calls, chosen.ttl_seconds, close, clock)


def _kept(chosen: Chosen, path: Path) -> KeptFolder | KeptObjects:
    """Where files of states are kept. Raises OSError, ConfigError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & stat.S_IWOTH:
        raise PermissionError(f"any user may write to {path}: chmod o-w")
    if chosen.states_url is not None:
        return KeptObjects(chosen.states_url, chosen.timeout_seconds, TRANSFER * chosen.timeout_seconds)
    folder = path / "states"
    folder.mkdir(mode=0o700, exist_ok=True)
    return KeptFolder(folder)


def _own_folder(path: Path) -> LockedFolder:
    """A folder of this process's. Raises OSError."""
    parent = path / "work"
    parent.mkdir(mode=0o700, exist_ok=True)
    remove_abandoned(parent, "")
    return LockedFolder.make(parent, "")


def _plain_folder(chosen: Chosen) -> LockedFolder:
    elsewhere = roomy_folder(chosen.max_state_bytes)
    remove_abandoned(elsewhere, PLAIN)
    return LockedFolder.make(elsewhere, PLAIN)


def _driver(chosen: Chosen, path: Path, work: LockedFolder) -> tuple[Driver, Presence]:
    if chosen.url is None:
        return Sqlite(path / "records.sqlite3"), InFolder(work)
    shared = Postgresql(chosen.url, chosen.timeout_seconds)
    return shared, InDatabase(shared)


def _calls(chosen: Chosen, database: Database, kept: KeptFolder | KeptObjects) -> StoreCalls:
    failures: Counter[str] = Counter()
    queries = Calls(1, "bdh-store", failures, None if chosen.url is None else chosen.timeout_seconds)
    if chosen.url is not None:
        probe = partial(queries.call, "probe", database.ping, is_probe=True)
        queries.circuit = Circuit("The store's database", (InterfaceError, OperationalError), probe)
    files = Calls(FILE_THREADS, "bdh-store-files", failures)
    if isinstance(kept, KeptFolder):
        return StoreCalls(failures, queries, files, files)
    transfers = Calls(FILE_THREADS, "bdh-store-objects", failures, TRANSFER * chosen.timeout_seconds)
    probe = partial(transfers.call, "probe", kept.ping, is_probe=True)
    transfers.circuit = Circuit("The object store of states", (ObjectStoreFailed,), probe)
    return StoreCalls(failures, queries, files, transfers)


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
