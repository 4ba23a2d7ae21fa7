"""The examples, as a user runs them, against a real server with the bundled model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Server

EXAMPLES = Path(__file__).parent.parent / "examples"
NOBODY = "http://127.0.0.1:9"
RUN_SECONDS = 300


def run(server: str, *command: str | Path, cwd: Path | None = None) -> str:
    """What an example prints; it must succeed."""
    done = subprocess.run(
        command,
        env={**os.environ, "OPENAI_BASE_URL": f"{server}/v1"},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_curl(server: Server) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    output = run(server.url, EXAMPLES / "curl.sh")
    assert '"id":"bdh-shakespeare"' in output
    assert '"object":"text_completion"' in output
    assert "data: [DONE]" in output


def test_openai_sync(server: Server) -> None:
    output = run(server.url, sys.executable, EXAMPLES / "openai_sync.py")
    _, completion, chat = re.split("# a .*\n", output, maxsplit=2)
    assert "completion_tokens=100" in completion
    assert chat.strip()


def test_openai_async(server: Server) -> None:
    output = run(server.url, sys.executable, EXAMPLES / "openai_async.py", "--max-tokens=5")
    assert "64 streams of bdh-shakespeare, 320 tokens" in output


def test_node(server: Server) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    if not (EXAMPLES / "node" / "node_modules" / "openai").is_dir():
        pytest.skip("the client is not installed: npm install --prefix examples/node")
    output = run(server.url, "node", "chat.mjs", cwd=EXAMPLES / "node")
    response, mark, reported = output.partition("\n# 100 tokens\n")
    assert mark
    assert response.strip()  # what the model says may end with empty lines
    scene, call, likeliest, embeddings, refusal = reported.splitlines()
    assert re.fullmatch("# a scene: act [1-5], (Verona|Mantua)", scene)
    assert re.fullmatch("# a call: play in (Verona|Mantua)", call)
    assert len(re.findall(r'"(?:[^"\\]|\\.)+"', likeliest)) == 3
    assert embeddings == "# 2 embeddings of 8"
    assert refusal == "# refused: suffix (unsupported_parameter)"


@pytest.mark.parametrize("example", ["openai_sync.py", "openai_async.py"])
def test_an_example_that_reaches_no_server_fails(example: str) -> None:
    with pytest.raises(AssertionError, match="APIConnectionError"):
        run(NOBODY, sys.executable, EXAMPLES / example)
