"""Threads that keep no program from ending."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from bdh_batch.system import threads as daemons
from bdh_batch.system.threads import STACK, DaemonThreads, left_behind

WITHIN = 300.0  # seconds; a hang is a failure


def test_calls_have_results_and_errors_and_can_be_seen_under_way() -> None:
    threads, begun, go_on = DaemonThreads(1, "test"), threading.Event(), threading.Event()

    def hold() -> str:
        begun.set()
        go_on.wait(WITHIN)
        return "held"

    holding = threads.submit(hold)
    assert begun.wait(WITHIN)
    assert left_behind()
    waiting = threads.submit(str, 5)
    cancelled = threads.submit(str, 6)
    assert cancelled.cancel()
    go_on.set()
    assert (holding.result(WITHIN), waiting.result(WITHIN)) == ("held", "5")
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(WITHIN)
    assert threads.submit(str, 7).result(WITHIN) == "7"


def test_a_call_that_no_thread_has_begun_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemons, "_under_way", set())
    monkeypatch.setattr(daemons, "_named", set())
    threads = DaemonThreads(0, "test")
    assert not left_behind()
    threads.submit(str, 5)
    assert left_behind()


def test_a_program_ends_while_a_call_is_under_way() -> None:
    lines = (
        "import time",
        "from bdh_batch.system.threads import *",
        "DaemonThreads(2, 'test').submit(time.sleep, 3600)",
    )
    code = "\n".join(lines)
    assert subprocess.run([sys.executable, "-c", code], timeout=WITHIN, check=False).returncode == 0


def test_a_thread_has_the_stack_that_it_asks_for_and_others_what_they_have_had() -> None:
    """A chain of so many rules takes some 25 MiB of stack to compile; with too little, the process dies."""
    code = (
        "import sys, threading\n"
        "from bdh_batch.text.compiler import compile_grammar\n"
        "from bdh_batch.text.vocabulary import byte_vocabulary\n"
        "from bdh_batch.system.threads import start_daemon\n"
        "chain = 'start: r0\\n' + '\\n'.join(f'r{i}: r{i + 1}' for i in range(8000)) + '\\nr8000: \"a\"'\n"
        "tokens, usual = byte_vocabulary(256).tokens, threading.stack_size()\n"
        "start_daemon(lambda: compile_grammar(tokens, chain), 'test', int(sys.argv[1])).join()\n"
        "assert threading.stack_size() == usual\n"
    )
    ends = [
        subprocess.run([sys.executable, "-c", code, str(stack)], timeout=WITHIN, check=False).returncode
        for stack in (STACK, 8 * 2**20)
    ]
    assert ends == [0, -signal.SIGSEGV]


def test_threads_that_nobody_can_call_any_more_end() -> None:
    """Once they have done what they were called for."""
    threads, go_on = DaemonThreads(2, "test-ending"), threading.Event()
    calls = [threads.submit(go_on.wait) for _ in range(5)]
    started = [each for each in threading.enumerate() if each.name == "test-ending"]
    assert len(started) == 2
    del threads
    go_on.set()
    for thread in started:
        thread.join()
    assert all(call.result() for call in calls)
