"""The database of a store: records, and which files of states there are.

A transaction does all that belongs together; there is one at a time, whichever process has it. Where the database and
the files are in one folder, that includes the files: a file gets its name in the folder of states within the
transaction that adds its row, and is removed after the one that removed it. So whoever holds the database's write lock
knows that a file without a row is an orphan, however many processes use the store, and whenever one was killed.

Elsewhere, a file is announced before it comes, and is noted as gone until it was removed: whichever process comes by
removes those of processes that were killed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection, Engine, Row
from sqlalchemy.exc import SQLAlchemyError

from bdh_batch.errors import StoreFailed, StoreFull
from bdh_batch.store import statements as sql
from bdh_batch.store.kept_files import KeptFolder
from bdh_batch.store.record import Record, StoreLimits
from bdh_batch.store.sealing import Sealer, SealingFailed
from bdh_batch.store.state_files import StateFiles

EXPIRED_AT_ONCE = 256  # records that one transaction removes
REMOVED_AT_ONCE = 64  # files
MOST_TOUCHED = 4096  # records that are read between two writes, and noted as used
UPLOAD_SECONDS = 3600.0  # after which a file that was announced is not expected any more


class Driver(Protocol):
    """Connects to a database: `Sqlite` and `Postgresql` do. Raises SQLAlchemyError.

    Attributes:
        reading: gives connections for single statements.
        writing: gives connections for transactions, of which there is one at a time, whichever process has it.
    """

    reading: Engine
    writing: Engine

    def migrate(self) -> None:
        """Makes the tables, or brings them up to date."""

    def tidy(self) -> None:
        """Gives back what nothing uses."""

    def close(self) -> None:
        """Closes all connections. Idempotent."""


class Sums(NamedTuple):
    """What a store holds in sum, what one owner has, and whether there are files to remove."""

    records: int
    states: int
    size: int
    own: int
    gone: int


class Database:
    """Keeps records. All of its methods but the constructor are for one thread.

    Raises SQLAlchemyError and OSError wherever something cannot be read or written.

    Args:
        sealer: encrypts bodies and tokens; None leaves them in plain.
        held: the folder of states, where files are kept and removed in its transactions; None where they are elsewhere.

    Attributes:
        leftovers: whether there may be files to remove; else, as of the last transaction, there are none.
    """

    def __init__(
        self, driver: Driver, files: StateFiles, limits: StoreLimits, sealer: Sealer | None, held: KeptFolder | None
    ) -> None:
        self._driver = driver
        self._files = files
        self._limits = limits
        self._sealer = sealer
        self._folder = held
        self._touched: dict[tuple[str, str], float] = {}  # what was read since the last write, and when
        self.evictions: Counter[str] = Counter()
        self.held: Mapping[str, int] = {}
        self.leftovers = False
        self._closed = False
        self._sums: Sums | None = None  # after the last change of a transaction, where they are known
        try:
            driver.migrate()
            with self._writing() as connection:
                self._check_key(connection)
                if held is not None:
                    self._clean(connection, held)
        except BaseException:
            driver.close()
            raise

    @property
    def announces(self) -> bool:
        """Whether a file is announced before it is kept."""
        return self._folder is None

    def ping(self) -> None:
        """Raises where the database does not respond."""
        with self._driver.reading.connect() as connection:
            connection.execute(sql.KEY_CHECK)

    def put(self, record: Record, now: float) -> None:
        """Raises StoreFull; StoreFailed where another owner has a record of that kind and id."""
        with self._writing() as connection:
            self._remove_expired(connection, now)
            values = {
                **_key(record.kind, record.id, record.owner),
                **{"created": record.created, "expires": record.expires, "now": now, "parent": record.parent},
                **{"state": record.state, **self._contents(record)},
            }
            if not connection.execute(sql.PUT, values).rowcount:
                raise StoreFailed(f"Another owner has a {record.kind} of that id.")
            self._make_room(connection, record.owner, (record.kind, record.id), record.state or "")

    def update(self, record: Record, now: float) -> bool:
        """Raises StoreFull."""
        with self._writing() as connection:
            self._remove_expired(connection, now)
            values = {**_key(record.kind, record.id, record.owner), "now": now, **self._contents(record)}
            found = connection.execute(sql.UPDATE, values).first()
            if found is not None:
                self._make_room(connection, record.owner, (record.kind, record.id), found[0] or "")
            return found is not None

    def get(self, kind: str, id: str, owner: str, now: float, is_use: bool = True) -> Record | None:
        if "\0" in id:  # which PostgreSQL takes in no text
            return None
        with self._driver.reading.connect() as connection:
            found = connection.execute(sql.GET, {**_key(kind, id, owner), "now": now}).first()
        if found is None:
            return None
        if is_use and len(self._touched) < MOST_TOUCHED:  # where nothing can be written, they are not noted
            self._touched[kind, id] = now
        return self._record(found)

    def latest(self, kind: str, most: int, now: float) -> Sequence[tuple[str, str]]:
        """The ids and owners of the records of the states that were used last, but for those that another one of them
        goes on from: it has gone further."""
        with self._driver.reading.connect() as connection:
            rows = connection.execute(sql.LATEST, {"kind": kind, "most": most, "now": now}).all()
        parents = {parent for _, _, parent in rows}
        return [(id, owner) for id, owner, _ in rows if id not in parents]

    def delete(self, kind: str, id: str, owner: str, now: float) -> bool:
        with self._writing() as connection:
            self._remove_expired(connection, now)
            return connection.execute(sql.DELETE, _key(kind, id, owner)).rowcount > 0

    def list(
        self, kind: str, owner: str, limit: int, after: str | None, now: float
    ) -> tuple[Sequence[Record], Mapping[str, str]]:
        """The newest first, without their tokens; and by the ids of those in between that cannot be decrypted, why."""
        found: list[Record] = []
        damaged: dict[str, str] = {}
        before: Sequence[Any] | None = (float("inf"), 2**63 - 1)
        with self._driver.reading.connect() as connection:
            while wanted := limit - len(found):
                if after is not None:
                    before = connection.execute(sql.POSITION, _key(kind, after, owner)).first()
                if before is None:
                    break
                values = {"kind": kind, "owner": owner, "now": now, "limit": wanted}
                rows = connection.execute(sql.LIST, {**values, "created": before[0], "rowid": before[1]}).all()
                for row in rows:
                    try:
                        found.append(self._record(row))
                    except SealingFailed as error:
                        damaged[row[0]] = str(error)
                if len(rows) < wanted:
                    break
                after = rows[-1][0]
        return found, damaged

    def announce(self, state: str, now: float) -> None:
        """Notes that a file is about to come, before it is kept elsewhere."""
        with self._writing() as connection:
            connection.execute(sql.ANNOUNCE, {"id": state, "until": now + UPLOAD_SECONDS})

    def give_up(self, state: str) -> None:
        """Notes that a file that was announced is to be removed. Idempotent."""
        with self._writing() as connection:
            self.leftovers = connection.execute(sql.GIVE_UP, {"id": state}).rowcount > 0

    def adopt(self, state: str, size: int, key: tuple[str, str, str], now: float) -> bool:
        """Makes a file that was prepared the state of a record, which is (kind, id, owner).

        Raises:
            StoreFull
            StoreFailed: it was announced too long ago.
        """
        kind, id, owner = key
        kept = False
        try:
            with self._writing() as connection:
                self._remove_expired(connection, now)
                if self.announces and not connection.execute(sql.ARRIVE, {"id": state}).rowcount:
                    raise StoreFailed("The state has taken too long to be stored.")
                connection.execute(sql.ADD_STATE, {"id": state, "owner": owner, "now": now, "size": size})
                if not connection.execute(sql.SET_STATE, {**_key(*key), "state": state}).rowcount:
                    connection.execute(sql.DELETE_STATE, {"id": state})
                    return False
                self._make_room(connection, owner, (kind, id), state)
                self._files.keep(state)
                kept = True
        except BaseException:
            if kept:
                self._remove(state)
            raise
        return True

    def remove_state(self, id: str) -> None:
        """Its records have none any more."""
        with self._writing() as connection:
            connection.execute(sql.DELETE_STATE, {"id": id})

    def to_remove(self, now: float) -> Sequence[str]:
        """The ids of files that are to be removed, some at a time."""
        with self._driver.reading.connect() as connection:
            found = connection.execute(sql.TO_REMOVE, {"now": now, "most": REMOVED_AT_ONCE}).all()
        self.leftovers = len(found) == REMOVED_AT_ONCE
        return [id for (id,) in found]

    def have_removed(self, ids: Sequence[str]) -> None:
        """Forgets files that were removed."""
        with self._writing() as connection:
            for statement in sql.HAVE_REMOVED:
                connection.execute(statement, {"ids": ids})

    def tidy(self, now: float) -> None:
        """Removes what has expired, and gives back to the disk what nothing uses."""
        with self._writing() as connection:
            self._remove_expired(connection, now)
        self._driver.tidy()
        self.leftovers = self.announces  # of those that have not come in time, nothing else tells

    def close(self) -> None:
        """Writes what was used when, and closes the database. Idempotent."""
        if self._closed:  # a transaction would open it again
            return
        self._closed = True
        with contextlib.suppress(SQLAlchemyError), self._writing():
            pass  # its disk or server may be gone; nothing is lost
        self._driver.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        """One transaction; files that it holds are removed once it is durable."""
        evictions = self.evictions.copy()
        self._sums = None
        try:
            with self._driver.writing.begin() as connection:
                self._note_uses(connection)
                yield connection
                sums = self._sums or _sums(connection)
                gone = self._gone(connection) if sums.gone else []
        except BaseException:
            self.evictions = evictions
            raise
        self.held = {"records": sums.records, "states": sums.states, "bytes": sums.size}
        self._touched.clear()
        for id in gone:
            self._remove(id)

    def _gone(self, connection: Connection) -> Sequence[str]:
        """The ids of files that are to be removed once the transaction is durable. Elsewhere, `to_remove` has them."""
        if self._folder is not None:
            return [id for (id,) in connection.execute(sql.TAKE_GONE)]
        self.leftovers = True
        return []

    def _note_uses(self, connection: Connection) -> None:
        uses = [{"now": now, "kind": kind, "id": id} for (kind, id), now in self._touched.items()]
        if uses:
            connection.execute(sql.NOTE_RECORD, uses)
            connection.execute(sql.NOTE_STATE, uses)

    def _remove_expired(self, connection: Connection, now: float) -> None:
        gone = connection.execute(sql.REMOVE_EXPIRED, {"now": now, "most": EXPIRED_AT_ONCE})
        self.evictions["expired"] += gone.rowcount

    def _make_room(self, connection: Connection, owner: str, key: tuple[str, str], state: str) -> None:
        """Removes what was used least recently until the limits hold: neither the record `key` nor its `state`.

        Raises:
            StoreFull: they cannot hold.
        """
        limits = self._limits
        owners: Iterable[str]
        while True:
            self._sums = sums = _sums(connection, owner)
            if limits.bytes_per_owner is not None and sums.own > limits.bytes_per_owner:
                owners, what = [owner], f"{limits.bytes_per_owner} bytes of one caller (store.max_bytes_per_key)"
            elif sums.size > limits.bytes:
                owners, what = _largest(connection, "size"), f"{limits.bytes} bytes (store.max_bytes)"
            elif sums.records > limits.records:
                owners, what = _largest(connection, "records"), f"{limits.records} records (store.max_records)"
                if any(self._remove_record(connection, each, key) for each in owners):
                    continue
                raise StoreFull(f"The store has room for {what}.")
            else:
                return
            if not any(self._remove_state(connection, each, state) for each in owners) and not any(
                self._remove_record(connection, each, key) for each in owners
            ):
                raise StoreFull(f"The store has room for {what}: this is larger.")

    def _remove_state(self, connection: Connection, owner: str, but: str) -> bool:
        gone = connection.execute(sql.REMOVE_STATE, {"owner": owner, "id": but}).rowcount
        self.evictions["state"] += gone
        return gone > 0

    def _remove_record(self, connection: Connection, owner: str, but: tuple[str, str]) -> bool:
        kind, id = but
        gone = connection.execute(sql.REMOVE_RECORD, _key(kind, id, owner)).rowcount
        self.evictions["record"] += gone
        return gone > 0

    def _remove(self, id: str) -> None:
        """Removes a file in the folder. One that stays is an orphan, removed at a start."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._files.remove(id)

    def _clean(self, connection: Connection, folder: KeptFolder) -> None:
        """Removes files without a row, and rows without a file."""
        rows = set(connection.execute(sql.STATES).scalars())
        files = {name.partition(".")[0] for name in folder.names()}
        for id in rows - files:
            connection.execute(sql.DELETE_STATE, {"id": id})
        for id in files - rows:
            self._remove(id)

    def _check_key(self, connection: Connection) -> None:
        """Raises SealingFailed: another key wrote the store."""
        found = connection.execute(sql.KEY_CHECK).scalar()
        if found is not None:
            self._files.check_key(bytes(found))
        else:
            connection.execute(sql.SET_KEY_CHECK, {"value": self._files.key_check()})

    def _contents(self, record: Record) -> dict[str, Any]:
        body, tokens = self._sealed(record, record.body, "body"), self._sealed(record, record.tokens, "tokens")
        return {"size": record.size, "body": body, "tokens": tokens}

    def _sealed(self, record: Record, data: bytes, part: str) -> bytes:
        return data if self._sealer is None else self._sealer.seal(data, _label(record.kind, record.id, part))

    def _record(self, row: Row[*tuple[Any, ...]]) -> Record:
        id, kind, owner, created, expires, parent, body, tokens, state = row
        tokens = b"" if tokens is None else self._opened(kind, id, tokens, "tokens")
        return Record(id, kind, owner, created, expires, parent, self._opened(kind, id, body, "body"), tokens, state)

    def _opened(self, kind: str, id: str, data: bytes, part: str) -> bytes:
        return data if self._sealer is None else self._sealer.open(data, _label(kind, id, part))


def _sums(connection: Connection, owner: str = "") -> Sums:
    return Sums(*map(int, connection.execute(sql.SUMS, {"owner": owner}).one()))


def _key(kind: str, id: str, owner: str) -> dict[str, str]:
    return {"kind": kind, "id": id, "owner": owner}


def _label(kind: str, id: str, part: str) -> bytes:
    return f"{kind} {id} {part}".encode()


def _largest(connection: Connection, column: str) -> Sequence[str]:
    """The owners who have most. The second one has something to remove where the first has only what is put."""
    return connection.execute(sql.LARGEST[column]).scalars().all()
