"""The life of a server of several processes: how it starts, replaces its engines, and ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.conftest import HANG_SECONDS, Cli, command, eventually
from tests.processes.test_processes import TINY, children, lives

READY = re.compile(r"the process engine-\S+ is ready")


def test_engines_are_started_again_and_replaced_and_children_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    """Here alone, each process is one that the server starts itself, as a user's does; elsewhere they are forked."""
    options = ["engine.replicas=1", "engine.threads=1", f"server.pid_file={tmp_path / 'pid'}"]
    arguments = [part for option in options for part in ("--set", option)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command("serve", "--port", 0, "--model", TINY, *arguments), stdout=log, stderr=log)
    try:
        log_text = (tmp_path / "log").read_text
        eventually(lambda: "is ready at" in log_text(), what=log_text)
        before = children(process.pid, "engine")
        assert len(before) == 1
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: len(READY.findall(log_text())) == 2, what=log_text)
        before += children(process.pid, "engine")
        assert len(before) == 2
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "all engines have been replaced" in log_text(), what=log_text)
        assert {*before}.isdisjoint(children(process.pid, "engine"))
        pids = [*children(process.pid, "engine"), *children(process.pid, "front")]
    finally:
        process.kill()
        process.wait(HANG_SECONDS)
    assert len(pids) == 2
    eventually(lambda: not any(lives(pid) for pid in pids))


def test_a_model_that_cannot_be_loaded_ends_the_start(cli: Cli, tmp_path: Path) -> None:
    done = cli("serve", "--port", 0, "--set", "engine.replicas=1", "--model", tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr


def test_nobody_can_be_asked_to_reload_who_does_not_run(cli: Cli, tmp_path: Path) -> None:
    done = cli("reload", "--pid-file", tmp_path / "none")
    assert (done.returncode, str(tmp_path) in done.stderr) == (2, True)
