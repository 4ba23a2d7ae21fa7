"""Connects a store to a SQLite database, in the folder of the store."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event
from sqlalchemy.exc import DatabaseError

from bdh_batch.store.schema import SQLITE

BUSY_SECONDS = 5.0  # that another process may hold the write lock
LARGEST_LOG = 16 * 2**20  # bytes that the write-ahead log keeps of the disk between transactions
FREED_AT_ONCE = 4096  # pages that go back to the disk when it is tidied up
PRAGMAS = (
    "auto_vacuum = INCREMENTAL",  # of a new database, before all else
    "journal_mode = WAL",
    f"journal_size_limit = {LARGEST_LOG}",
    "synchronous = FULL",  # what was acknowledged outlives a power failure
    "secure_delete = ON",
    "recursive_triggers = OFF",
)


class Sqlite:
    """One connection, for one thread.

    Attributes:
        reading: gives connections for single statements.
        writing: gives connections for transactions, of which there is one at a time, whichever process has it.
    """

    def __init__(self, path: Path) -> None:
        _make_own(path)
        self.reading = create_engine("sqlite://", creator=lambda: _connect(path), poolclass=StaticPool)
        self.writing: Engine = self.reading.execution_options(writes=True)
        event.listen(self.reading, "begin", _begin)

    def migrate(self) -> None:
        """Raises DatabaseError where a newer version wrote the database."""
        with self.writing.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            check_version(version, len(SQLITE))
            for number, script in enumerate(SQLITE[version:], version + 1):
                for statement in _statements(script):
                    connection.exec_driver_sql(statement)
                connection.exec_driver_sql(f"PRAGMA user_version = {number}")

    def tidy(self) -> None:
        """Gives back to the disk what nothing uses."""
        with self.reading.connect() as connection:
            # A script, as `execute` would take one step of it, which is one page.
            driver: Any = connection.connection.driver_connection
            driver.executescript(f"PRAGMA incremental_vacuum({FREED_AT_ONCE})")

    def close(self) -> None:
        """Idempotent."""
        self.reading.dispose()


def check_version(version: int, known: int) -> None:
    """Raises DatabaseError: the schema is that of a newer program."""
    if version > known:
        problem = sqlite3.DatabaseError(f"its schema is version {version}, of a newer bdh-batch")
        raise DatabaseError(None, None, problem)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
    )
    try:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def _begin(connection: Connection) -> None:
    """Takes the write lock for a transaction. A single statement begins none: the driver commits it."""
    if connection.get_execution_options().get("writes"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _make_own(path: Path) -> None:
    """Makes it a file that only its user can read, as those that SQLite puts beside it then are."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
