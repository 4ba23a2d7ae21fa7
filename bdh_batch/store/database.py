"""The SQLite database of a store: records, and which files of states there are.

A transaction does all that belongs together, the files included: a file gets its name in the folder of states within
the transaction that adds its row, and is removed after the one that removed it. So whoever holds the database's write
lock knows that a file without a row is an orphan, however many processes use the store, and whenever one was killed.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdh_batch.errors import StoreFull
from bdh_batch.store.record import Record, StoreLimits
from bdh_batch.store.sealing import Sealer
from bdh_batch.store.state_files import StateFiles

BUSY_SECONDS = 5.0  # that another process may hold the write lock
LARGEST_LOG = 16 * 2**20  # bytes that the write-ahead log keeps of the disk between transactions
FREED_AT_ONCE = 4096  # pages that go back to the disk when it is tidied up
EXPIRED_AT_ONCE = 256  # records that one transaction removes

# One script for each version of the schema; `user_version` is how many have been run.
MIGRATIONS = (
    """
    CREATE TABLE records (
        kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL,
        created REAL NOT NULL, expires REAL, used REAL NOT NULL,
        parent TEXT, state TEXT, size INTEGER NOT NULL, body BLOB NOT NULL, tokens BLOB NOT NULL,
        UNIQUE (kind, id)
    );
    CREATE INDEX records_by_owner ON records (owner, kind, created);
    CREATE INDEX records_by_use ON records (owner, used);
    CREATE INDEX records_by_state ON records (state) WHERE state IS NOT NULL;
    CREATE INDEX records_by_expiry ON records (expires) WHERE expires IS NOT NULL;

    CREATE TABLE states (id TEXT PRIMARY KEY, owner TEXT NOT NULL, used REAL NOT NULL, size INTEGER NOT NULL);
    CREATE INDEX states_by_use ON states (owner, used);
    CREATE TABLE gone (id TEXT NOT NULL);  -- states whose files have to be removed

    CREATE TABLE totals (
        owner TEXT PRIMARY KEY, records INTEGER NOT NULL, states INTEGER NOT NULL, size INTEGER NOT NULL
    );

    CREATE TRIGGER record_added AFTER INSERT ON records BEGIN
        INSERT INTO totals VALUES (NEW.owner, 1, 0, NEW.size)
            ON CONFLICT (owner) DO UPDATE SET records = records + 1, size = size + NEW.size;
    END;
    CREATE TRIGGER record_sized AFTER UPDATE OF size ON records BEGIN
        UPDATE totals SET size = size + NEW.size - OLD.size WHERE owner = NEW.owner;
    END;
    CREATE TRIGGER record_removed AFTER DELETE ON records BEGIN
        UPDATE totals SET records = records - 1, size = size - OLD.size WHERE owner = OLD.owner;
        DELETE FROM totals WHERE owner = OLD.owner AND records = 0 AND states = 0;
    END;
    CREATE TRIGGER state_added AFTER INSERT ON states BEGIN
        INSERT INTO totals VALUES (NEW.owner, 0, 1, NEW.size)
            ON CONFLICT (owner) DO UPDATE SET states = states + 1, size = size + NEW.size;
    END;
    CREATE TRIGGER state_removed AFTER DELETE ON states BEGIN
        UPDATE totals SET states = states - 1, size = size - OLD.size WHERE owner = OLD.owner;
        DELETE FROM totals WHERE owner = OLD.owner AND records = 0 AND states = 0;
        UPDATE records SET state = NULL WHERE state = OLD.id;
        INSERT INTO gone VALUES (OLD.id);
    END;
    CREATE TRIGGER last_use_removed AFTER DELETE ON records WHEN OLD.state IS NOT NULL BEGIN
        DELETE FROM states WHERE id = OLD.state AND NOT EXISTS (SELECT 1 FROM records WHERE state = OLD.state);
    END;
    CREATE TRIGGER last_use_changed AFTER UPDATE OF state ON records WHEN OLD.state IS NOT NULL BEGIN
        DELETE FROM states WHERE id = OLD.state AND NOT EXISTS (SELECT 1 FROM records WHERE state = OLD.state);
    END;

    CREATE TABLE about (name TEXT PRIMARY KEY, value BLOB NOT NULL);
    """,
)

COLUMNS = "id, kind, owner, created, expires, parent, body, tokens, state"


class Database:
    """Keeps records in SQLite. All of its methods but the constructor are for one thread.

    Raises sqlite3.Error and OSError wherever something cannot be read or written.

    Args:
        sealer: encrypts bodies and tokens; None leaves them in plain.
    """

    def __init__(self, path: Path, files: StateFiles, limits: StoreLimits, sealer: Sealer | None) -> None:
        self._files = files
        self._limits = limits
        self._sealer = sealer
        self._touched: dict[tuple[str, str], float] = {}  # what was read since the last write, and when
        self.evictions: Counter[str] = Counter()
        self.held: Mapping[str, int] = {}
        self._connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # of a new database, before all else
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA journal_size_limit = {LARGEST_LOG}")
            self._connection.execute("PRAGMA synchronous = FULL")  # what was acknowledged outlives a power failure
            self._connection.execute("PRAGMA secure_delete = ON")
            self._connection.execute("PRAGMA recursive_triggers = OFF")
            self._migrate()
            with self._writing():
                self._clean()
        except BaseException:
            self._connection.close()
            raise

    def put(self, record: Record, now: float) -> None:
        """Raises StoreFull."""
        with self._writing():
            self._remove_expired(now)
            values = (
                *(record.kind, record.id, record.owner, record.created, record.expires, now, record.parent),
                *(record.state, record.owner, record.size),
                *(self._sealed(record, record.body, "body"), self._sealed(record, record.tokens, "tokens")),
            )
            changed = self._connection.execute(
                "INSERT INTO records (kind, id, owner, created, expires, used, parent, state, size, body, tokens) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, (SELECT id FROM states WHERE id = ? AND owner = ?), ?, ?, ?) "
                "ON CONFLICT (kind, id) DO UPDATE SET created = excluded.created, expires = excluded.expires, "
                "used = excluded.used, parent = excluded.parent, state = excluded.state, size = excluded.size, "
                "body = excluded.body, tokens = excluded.tokens WHERE owner = excluded.owner",
                values,
            ).rowcount
            if not changed:
                raise sqlite3.IntegrityError(f"another owner has a {record.kind} of that id")
            self._make_room(record.owner, (record.kind, record.id), record.state or "")

    def update(self, record: Record, now: float) -> bool:
        """Raises StoreFull."""
        with self._writing():
            self._remove_expired(now)
            body, tokens = self._sealed(record, record.body, "body"), self._sealed(record, record.tokens, "tokens")
            found = self._connection.execute(
                "UPDATE records SET used = ?, size = ?, body = ?, tokens = ? "
                "WHERE kind = ? AND id = ? AND owner = ? RETURNING state",
                (now, record.size, body, tokens, record.kind, record.id, record.owner),
            ).fetchone()
            if found is not None:
                self._make_room(record.owner, (record.kind, record.id), found[0] or "")
            return found is not None

    def get(self, kind: str, id: str, owner: str, now: float) -> Record | None:
        found = self._connection.execute(
            f"SELECT {COLUMNS} FROM records WHERE kind = ? AND id = ? AND owner = ? "
            "AND (expires IS NULL OR expires > ?)",
            (kind, id, owner, now),
        ).fetchone()
        if found is None:
            return None
        self._touched[kind, id] = now
        return self._record(found)

    def delete(self, kind: str, id: str, owner: str, now: float) -> bool:
        with self._writing():
            self._remove_expired(now)
            gone = self._connection.execute(
                "DELETE FROM records WHERE kind = ? AND id = ? AND owner = ?", (kind, id, owner)
            )
            return gone.rowcount > 0

    def list(self, kind: str, owner: str, limit: int, after: str | None, now: float) -> Sequence[Record]:
        """The newest first, without their tokens."""
        before: tuple[float, int] = (float("inf"), 2**63 - 1)
        if after is not None:
            where = "kind = ? AND id = ? AND owner = ?"
            found = self._connection.execute(f"SELECT created, rowid FROM records WHERE {where}", (kind, after, owner))
            if (row := found.fetchone()) is None:
                return []
            before = row
        rows = self._connection.execute(
            f"SELECT {COLUMNS.replace('tokens', 'NULL')} FROM records WHERE owner = ? AND kind = ? "
            "AND (expires IS NULL OR expires > ?) AND (created, rowid) < (?, ?) "
            "ORDER BY created DESC, rowid DESC LIMIT ?",
            (owner, kind, now, *before, limit),
        )
        return [self._record(row) for row in rows]

    def adopt(self, state: str, size: int, key: tuple[str, str, str], now: float) -> bool:
        """Makes a file that was prepared the state of a record, which is (kind, id, owner). Raises StoreFull."""
        kind, id, owner = key
        with self._writing():
            self._remove_expired(now)
            self._connection.execute("INSERT INTO states VALUES (?, ?, ?, ?)", (state, owner, now, size))
            changed = self._connection.execute(
                "UPDATE records SET state = ? WHERE kind = ? AND id = ? AND owner = ?", (state, *key)
            ).rowcount
            if not changed:
                self._connection.execute("DELETE FROM states WHERE id = ?", (state,))
                return False
            self._make_room(owner, (kind, id), state)
            try:
                self._files.keep(state)
                self._commit()
            except BaseException:
                self._files.remove(state)
                raise
            return True

    def remove_state(self, id: str) -> None:
        """Its records have none any more."""
        with self._writing():
            self._connection.execute("DELETE FROM states WHERE id = ?", (id,))

    def tidy(self, now: float) -> None:
        """Removes what has expired, and gives back to the disk what nothing uses."""
        with self._writing():
            self._remove_expired(now)
        # A script, as `execute` would take one step of it, which is one page.
        self._connection.executescript(f"PRAGMA incremental_vacuum({FREED_AT_ONCE})")

    def close(self) -> None:
        """Writes what was used when, and closes the database. Idempotent."""
        with contextlib.suppress(sqlite3.Error):  # it is closed already, or its disk is gone; nothing is lost
            with self._writing():
                pass
            self._connection.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction; its files are removed once it is durable."""
        self._connection.execute("BEGIN IMMEDIATE")
        evictions = self.evictions.copy()
        try:
            self._note_uses()
            yield
            self._commit()
        except BaseException:
            self.evictions = evictions
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _commit(self) -> None:
        """Ends the transaction, where it has not ended."""
        if not self._connection.in_transaction:
            return
        gone = [id for (id,) in self._connection.execute("DELETE FROM gone RETURNING id")]
        row = self._connection.execute("SELECT total(records), total(states), total(size) FROM totals").fetchone()
        self._connection.execute("COMMIT")
        self.held = {name: int(value) for name, value in zip(("records", "states", "bytes"), row)}
        self._touched.clear()
        for id in gone:
            self._files.remove(id)

    def _note_uses(self) -> None:
        uses = [(now, *key) for key, now in self._touched.items()]
        self._connection.executemany("UPDATE records SET used = max(used, ?) WHERE kind = ? AND id = ?", uses)
        self._connection.executemany(
            "UPDATE states SET used = max(used, ?) WHERE id = (SELECT state FROM records WHERE kind = ? AND id = ?)",
            uses,
        )

    def _remove_expired(self, now: float) -> None:
        gone = self._connection.execute(
            "DELETE FROM records WHERE rowid IN (SELECT rowid FROM records WHERE expires <= ? LIMIT ?)",
            (now, EXPIRED_AT_ONCE),
        )
        self.evictions["expired"] += gone.rowcount

    def _make_room(self, owner: str, key: tuple[str, str], state: str) -> None:
        """Removes what was used least recently until the limits hold: neither the record `key` nor its `state`.

        Raises:
            StoreFull: they cannot hold.
        """
        limits = self._limits
        owners: Iterable[str]
        while True:
            records, size = self._connection.execute("SELECT total(records), total(size) FROM totals").fetchone()
            (own,) = self._connection.execute("SELECT size FROM totals WHERE owner = ?", (owner,)).fetchone()
            if limits.bytes_per_owner is not None and own > limits.bytes_per_owner:
                owners, what = [owner], f"{limits.bytes_per_owner} bytes of one caller (store.max_bytes_per_key)"
            elif size > limits.bytes:
                owners, what = self._largest("size"), f"{limits.bytes} bytes (store.max_bytes)"
            elif records > limits.records:
                owners, what = self._largest("records"), f"{limits.records} records (store.max_records)"
                if any(self._remove_record(each, key) for each in owners):
                    continue
                raise StoreFull(f"The store has room for {what}.")
            else:
                return
            if not any(self._remove_state(each, state) for each in owners) and not any(
                self._remove_record(each, key) for each in owners
            ):
                raise StoreFull(f"The store has room for {what}: this is larger.")

    def _largest(self, column: str) -> Iterable[str]:
        """The owners who have most. The second one has something to remove where the first has only what is put."""
        rows = self._connection.execute(f"SELECT owner FROM totals ORDER BY {column} DESC LIMIT 2")
        return [owner for (owner,) in rows]

    def _remove_state(self, owner: str, but: str) -> bool:
        gone = self._connection.execute(
            "DELETE FROM states WHERE id = (SELECT id FROM states WHERE owner = ? AND id != ? ORDER BY used LIMIT 1)",
            (owner, but),
        )
        self.evictions["state"] += gone.rowcount
        return gone.rowcount > 0

    def _remove_record(self, owner: str, but: tuple[str, str]) -> bool:
        gone = self._connection.execute(
            "DELETE FROM records WHERE rowid = (SELECT rowid FROM records WHERE owner = ? AND (kind, id) != (?, ?) "
            "ORDER BY used LIMIT 1)",
            (owner, *but),
        )
        self.evictions["record"] += gone.rowcount
        return gone.rowcount > 0

    def _migrate(self) -> None:
        """Raises sqlite3.DatabaseError where a newer version wrote the database."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise sqlite3.DatabaseError(f"its schema is version {version}, of a newer bdh-batch")
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                for statement in _statements(script):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {number}")
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise

    def _clean(self) -> None:
        """Removes files without a row, and rows without a file. Raises SealingFailed: another key wrote the store."""
        self._check_key()
        rows = {id for (id,) in self._connection.execute("SELECT id FROM states")}
        files = self._files.kept()
        for id in rows - files:
            self._connection.execute("DELETE FROM states WHERE id = ?", (id,))
        for id in files - rows:
            self._files.remove(id)

    def _check_key(self) -> None:
        found = self._connection.execute("SELECT value FROM about WHERE name = 'key'").fetchone()
        if found is not None:
            self._files.check_key(bytes(found[0]))
        else:
            self._connection.execute("INSERT INTO about VALUES ('key', ?)", (self._files.key_check(),))

    def _sealed(self, record: Record, data: bytes, part: str) -> bytes:
        return data if self._sealer is None else self._sealer.seal(data, _label(record.kind, record.id, part))

    def _record(self, row: tuple[Any, ...]) -> Record:
        id, kind, owner, created, expires, parent, body, tokens, state = row
        tokens = b"" if tokens is None else self._opened(kind, id, tokens, "tokens")
        return Record(id, kind, owner, created, expires, parent, self._opened(kind, id, body, "body"), tokens, state)

    def _opened(self, kind: str, id: str, data: bytes, part: str) -> bytes:
        return data if self._sealer is None else self._sealer.open(data, _label(kind, id, part))


def _label(kind: str, id: str, part: str) -> bytes:
    return f"{kind} {id} {part}".encode()


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
