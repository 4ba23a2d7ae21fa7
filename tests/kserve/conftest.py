"""The worker that most tests of KServe's protocol share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.conftest import CONFORMANCE, free_port
from tests.kserve.support import Worker, worker_of

if TYPE_CHECKING:
    from tests.conftest import ServeFactory


@pytest.fixture(scope="session")
def worker(serve: ServeFactory) -> Iterator[Worker]:
    """A random model of bytes, with gRPC."""
    options = ("model.aliases=generate", "kserve.max_stream_requests=8")
    with worker_of(serve, free_port(), "tiny", *options, model=CONFORMANCE / "tiny") as worker:
        yield worker
