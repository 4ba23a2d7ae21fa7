"""Connects a store to a PostgreSQL database that several servers share."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError

from bdh_batch.errors import ConfigError
from bdh_batch.settings import without_password
from bdh_batch.store.schema import POSTGRESQL
from bdh_batch.store.sqlite import check_version

SCHEMA = "bdh_batch"  # in which the tables are
WRITE_LOCK = 0x6264685F  # the number of the lock that a transaction takes
KEEPALIVES = 3  # without an answer, after which a connection is broken
ALIVE_SECONDS = 60.0  # since a process has last been heard of
FORGOTTEN_SECONDS = 86400.0

VERSION = text(f"SELECT value FROM {SCHEMA}.about WHERE name = 'schema'")
SET_VERSION = text(
    "INSERT INTO about VALUES ('schema', :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
)
NOW = "extract(epoch FROM clock_timestamp())::double precision"  # the clocks of machines differ
BEAT = text(f"INSERT INTO processes VALUES (:name, {NOW}) ON CONFLICT (name) DO UPDATE SET seen = excluded.seen")
LEAVE = text("DELETE FROM processes WHERE name = :name")
LIVES = text(f"SELECT 1 FROM processes WHERE name = :name AND seen > {NOW} - {ALIVE_SECONDS}")
FORGET = text(f"DELETE FROM processes WHERE seen < {NOW} - {FORGOTTEN_SECONDS}")


class Postgresql:
    """One connection at a time, for one thread. One that was lost is made anew.

    A server that does not respond is given up after about `seconds`; what it had begun by then, it gives up, too.

    Attributes:
        reading, writing: as `Sqlite` has them.

    Raises:
        ConfigError: the URL is none of a PostgreSQL database, or a package is missing.
    """

    def __init__(self, url: str, seconds: float) -> None:
        try:
            parsed = make_url(url).set(drivername="postgresql+psycopg")
            created = create_engine(
                parsed,
                hide_parameters=True,
                pool_size=1,
                max_overflow=0,
                pool_pre_ping=True,
                connect_args=_connection_options(seconds),
            )
        except (ArgumentError, ValueError):
            raise ConfigError(f"store.url: {without_password(url)} is no URL of a database") from None
        except ImportError as error:
            needed = "PostgreSQL needs a package: pip install 'bdh-batch[shared-store]'"
            raise ConfigError(f"store.url: {needed}") from error
        self.reading: Engine = created.execution_options(isolation_level="AUTOCOMMIT")
        self.writing: Engine = created.execution_options(writes=True)
        event.listen(created, "begin", _begin)

    def migrate(self) -> None:
        """Raises DatabaseError where a newer version wrote the tables."""
        with self.writing.begin() as connection:
            version = _version(connection)
            check_version(version, len(POSTGRESQL))
            for script in POSTGRESQL[version:]:
                connection.exec_driver_sql(script, execution_options={"no_parameters": True})
            if version < len(POSTGRESQL):
                connection.execute(SET_VERSION, {"value": str(len(POSTGRESQL)).encode()})

    def tidy(self) -> None:
        """Forgets processes that have ended long ago. The rest is the server's own to do."""
        with self.reading.connect() as connection:
            connection.execute(FORGET)

    def beat(self, process: str) -> None:
        """Notes that a process lives."""
        with self.reading.connect() as connection:
            connection.execute(BEAT, {"name": process})

    def leave(self, process: str) -> None:
        """Notes that a process has ended."""
        with self.reading.connect() as connection:
            connection.execute(LEAVE, {"name": process})

    def lives(self, process: str) -> bool:
        """Whether a process has been heard of lately."""
        with self.reading.connect() as connection:
            return connection.execute(LIVES, {"name": process}).first() is not None

    def close(self) -> None:
        """Idempotent."""
        self.writing.dispose()


def _connection_options(seconds: float) -> dict[str, Any]:
    milliseconds, whole = math.ceil(1000 * seconds), max(2, math.ceil(seconds))
    session = {
        "search_path": SCHEMA,
        "statement_timeout": milliseconds,
        "lock_timeout": milliseconds,
        # One that is stopped in the middle of a transaction does not keep all others from writing.
        "idle_in_transaction_session_timeout": 2 * milliseconds,
    }
    return {
        "connect_timeout": whole,
        "keepalives_idle": whole,
        "keepalives_interval": whole,
        "keepalives_count": KEEPALIVES,
        "tcp_user_timeout": milliseconds,
        "application_name": "bdh-batch",
        "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
    }


def _begin(connection: Connection) -> None:
    """Takes the write lock for a transaction: they all count on being alone."""
    if connection.get_execution_options().get("writes"):
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": WRITE_LOCK})


def _version(connection: Connection) -> int:
    """Returns the version of the tables that are there, 0 for none, and makes the schema where it is missing."""
    found = connection.execute(text(f"SELECT to_regnamespace('{SCHEMA}'), to_regclass('{SCHEMA}.about')"))
    namespace, table = found.one()
    if namespace is None:
        connection.exec_driver_sql(f"CREATE SCHEMA {SCHEMA}")
    return 0 if table is None else int(bytes(connection.execute(VERSION).scalar_one()))
