"""Clients in JavaScript, each tested by Node's own test runner."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Endpoint

FOLDER = Path(__file__).parent.parent / "node"
TEST_SECONDS = 300  # most of it is how long Node takes to load a client


@pytest.mark.skipif(not (FOLDER / "node_modules").is_dir(), reason="npm was not there to install them")
@pytest.mark.parametrize(
    "file", sorted(FOLDER.glob("*.test.mjs")), ids=lambda file: file.name.removesuffix(".test.mjs")
)
def test_client(endpoint: Endpoint, file: Path) -> None:
    told = {"BDH_URL": endpoint.url, "BDH_KEY": endpoint.key, "BDH_MODEL": endpoint.model}
    done = subprocess.run(
        [shutil.which("node") or "node", "--test", file.name],
        cwd=FOLDER,
        env=os.environ | told,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TEST_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
