"""What the commands print, where it cannot be written."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest

from bdh_batch import settings
from bdh_batch.cli import main

COMMAND = [sys.executable, "-m", "bdh_batch", "config", "default"]


def test_a_reader_who_has_left_is_no_fault() -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(COMMAND, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_output_that_cannot_be_written_is_told_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (1, "bdh-batch: [Errno 28] No space left on device\n")


def test_an_interrupted_command_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "default_yaml", lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where it was ignored at the start, it still is
    try:
        assert main(["config", "default"]) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_breaks_elsewhere_is_no_readers_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise BrokenPipeError("a socket")

    monkeypatch.setattr(settings, "default_yaml", broken)
    for stdout in (sys.stdout, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError, match="a socket"):
            main(["config", "default"])
