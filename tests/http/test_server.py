"""The start and the end of a process, where its timing is the point."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bdh_batch.errors import ConfigError
from bdh_batch.http.transport.server import bind
from tests.conftest import eventually

if TYPE_CHECKING:
    from tests.conftest import ServeFactory


def test_an_address_is_taken_as_soon_as_it_is_bound() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_first_imports_ends_the_program_without_a_word(number: signal.Signals) -> None:
    code = "import sys, bdh_batch.cli as cli; print('go', flush=True); sys.exit(cli.main(['serve', '--port', '0']))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BDH_")}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        # The handlers are the first thing that `serve` does; importing torch follows, and takes seconds.
        eventually(lambda: handles(process.pid, signal.SIGTERM) or process.poll() is not None)
        process.send_signal(number)
        assert process.wait(300) == 0
        assert b"Traceback" not in process.stderr.read()


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal. `serve` sets that for SIGTERM last."""
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> number - 1 & 1)


def test_a_default_gives_way_to_the_longest_context_and_an_explicit_value_does_not(serve: ServeFactory) -> None:
    with serve("model.max_model_len=100", "scheduler.max_running=2") as server:
        response = server.complete(prompt="abc")
        assert response["usage"]["completion_tokens"] == 97
        assert server.refusal({"prompt": "abc", "max_tokens": 98})["param"] == "max_tokens"
        assert server.complete(prompt="abc", max_tokens=97)["usage"]["completion_tokens"] == 97
        error = server.refusal({"prompt": "a" * 100})
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
