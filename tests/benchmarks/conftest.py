"""What the benchmarks' tests share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from benchmarks import served
from tests.conftest import ONE_THREAD, ROOT, clean_environment
from tests.launcher import Launcher, Process


@pytest.fixture(scope="module")
def forked_servers(launcher: Launcher) -> Iterator[None]:
    """The servers that benchmarks start are forked, as most of the other tests' are."""

    def start(program: Sequence[str], root: Path, output: IO[bytes]) -> Process:
        assert root == ROOT
        module, *arguments = program
        environment = clean_environment() | ONE_THREAD
        return launcher.start(arguments, environment, output, module=module, brief_end=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "start", start)
        yield
