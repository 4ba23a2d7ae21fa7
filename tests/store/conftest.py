"""A PostgreSQL server for the tests of shared stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.store.postgresql import Postgresql, why_not


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgresql]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Postgresql.run() as server:
        yield server


@pytest.fixture
def database(postgresql: Postgresql) -> str:
    """The URL of a database without a store."""
    postgresql.empty()
    return postgresql.url
