"""A model in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bdh_batch import LLM

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"


@pytest.fixture(scope="session")
def folder() -> Path:
    """The random model of bytes that the server `tiny` has, too."""
    return TINY


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder) as llm:
        yield llm
