"""Threads that take pieces of a step: each piece once, nobody waits for a thread, and the bits stay the same."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from bdh_batch.kernels import cores, cpu_layout, team, vector
from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.cpu import CpuKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.conftest import ROOT
from tests.kernels.support import alone, feed, model, states_for, text

ONE_CORE_AND_A_FORK = """
import os, sys, torch
from bdh_batch.kernels.cpu import CpuKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import alone, model, states_for, text

torch.set_num_threads(int(sys.argv[1]))
weights = synthetic_weights(model(2, 3, 32, 64, 60), 0.3)
kernels = CpuKernels(weights)
usual = alone(kernels, states_for(weights, 1), text(50, 60), 0, [30, 31])
child = os.fork()
if child == 0:  # has none of the threads, and starts its own
    os._exit(not torch.equal(usual, alone(kernels, states_for(weights, 1), text(50, 60), 0, [30, 31])))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
for _ in range(5):
    child = os.fork()
    if child == 0:  # ends right behind its kernels, whose threads still come back to the interpreter
        kernels = None
        alone(CpuKernels(weights), states_for(weights, 1), text(50, 60), 0, [30, 31])
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # of this thread alone
    assert torch.equal(usual, alone(kernels, states_for(weights, 1), text(50, 60), 0, [30, 31]))
    again = CpuKernels(weights)  # whose threads have that core alone
    assert torch.equal(usual, alone(again, states_for(weights, 1), text(50, 60), 0, [30, 31]))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_have_the_threads_of_the_engine_until_it_is_gone(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def helpers() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name == team.NAME}

    weights, before = synthetic_weights(model(3, 2, 48, 96, 60), 0.3), helpers()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    kernels = CpuKernels(weights)
    alone(kernels, states_for(weights, 1), text(80, 60), 0, [50, 60])
    started = helpers() - before
    assert len(started) == min(threads, vector.most_threads()) - 1
    del kernels
    gc.collect()
    for each in started:
        each.join(300)
        assert not each.is_alive()


def test_nobody_waits_for_a_thread_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where another program has its core."""
    weights = synthetic_weights(model(2, 3, 32, 64, 3_000), 0.3)
    sequences = {slot: text(30, 40, slot) for slot in range(7)}
    pieces = [(slot, 0, 1 if slot % 2 else 30) for slot in sequences]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    usual = feed(CpuKernels(weights), states_for(weights, 7), sequences, pieces)
    monkeypatch.setattr(team, "_help", lambda *_: None)
    other = feed(CpuKernels(weights), states_for(weights, 7), sequences, pieces)
    assert torch.equal(torch.cat(usual), torch.cat(other))


def test_after_a_fork_and_on_one_core_steps_go_on_with_the_same_bits() -> None:
    threads = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }  # forks with threads are warned of
    command = [sys.executable, "-c", ONE_CORE_AND_A_FORK, str(threads)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_what_a_helper_raises_is_raised_by_the_next_step() -> None:
    """And what is raised before helpers start, as where it cannot be compiled, at once."""
    board = team.new_board(3, 1)

    def serve(number: int) -> None:
        if not board.words[team.ENDED]:
            raise MemoryError(f"helper {number}")

    before = set(threading.enumerate())
    pool = team.ThreadPool(3, board, serve)
    for each in set(threading.enumerate()) - before:
        each.join(300)
    with pytest.raises(MemoryError, match="helper"):
        pool.check()
    assert not board.threads[team.THREAD_ID :: team.THREAD].any()

    def broken(number: int) -> None:
        raise MemoryError(f"compiled for {number}")

    with pytest.raises(MemoryError, match="compiled for 1"):
        team.ThreadPool(3, board, broken)


def test_tokens_that_do_not_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers find a step's arrays by their addresses."""
    weights = synthetic_weights(model(1, 2, 32, 64, 60), 0.3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    kernels = CpuKernels(weights)
    columns = text(24, 60).view(8, 3)

    def hidden(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        batch = RaggedBatch(tokens, positions, list(range(9)), list(range(8)))
        return kernels.forward(states_for(weights, 8), batch)

    apart = torch.arange(24).view(8, 3)
    assert torch.equal(hidden(columns[:, 1], apart[:, 1]), hidden(columns[:, 1].clone(), apart[:, 1].clone()))


def test_who_was_away_for_a_step_takes_nothing_of_the_next() -> None:
    """Every piece is taken once, in the order of the loops, and the next loop begins when the last piece is done."""
    board = team.new_board(2, 2)
    set_group(board, 0, 2, 1, 2)
    set_group(board, 1, 1, 1, 1)
    team.begin(board, 2)
    first, second = take_piece(board, 0, 1), take_piece(board, 0, 1)
    assert [each % team.PIECES for each in (first, second)] == [0, 1]
    assert take_piece(board, 0, 1) == team.NOTHING
    finish_piece(board, 0, second)
    assert take_piece(board, 0, 1) == team.NOTHING
    finish_piece(board, 0, first)
    third = take_piece(board, 0, 1)
    assert (third >> team.LOOP_BITS) % team.MOST_LOOPS == 1
    finish_piece(board, 0, third)
    assert board.words[team.LEFT] == 1
    finish_piece(board, 1, take_piece(board, 1, 1))
    assert board.words[team.LEFT] == 0
    set_group(board, 0, 5, 5, 9)  # as while the next step is written down
    assert take_piece(board, 0, 1) == team.NOTHING
    team.begin(board, 1)
    assert take_piece(board, 0, 1) == team.NOTHING
    assert take_piece(board, 0, 2) % team.PIECES == 0


def test_who_was_away_after_its_piece_begins_no_loop_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may lose its core between counting its piece as done and looking whether that was the last one."""
    board = team.new_board(2, 1)
    board.groups[:] = 0
    board.groups[team.BY_ROWS], board.groups[team.LOOPS] = 2, 1
    written: list[int] = []

    def add(numbers: cpu_layout.Longs, index: int, value: int) -> int:
        board.groups[team.BY_ROWS] = 1  # meanwhile others finish the step, and the next one, of fewer pieces, is put up
        return 0

    monkeypatch.setattr(team, "add", add)
    monkeypatch.setattr(team, "write", lambda numbers, index, value: written.append(value))
    team.finish.py_func(board, 0, 1 << team.GENERATION_BITS)  # type: ignore[attr-defined]
    assert not written


@pytest.mark.parametrize("early", [True, False])
def test_a_thread_that_sleeps_is_woken_once_and_none_is_missed(early: bool) -> None:
    """Also one that something happened to while it went to sleep."""
    board = team.new_board(2, 1)
    for seen in range(50):
        if early:
            announce(board)
        sleeper = threading.Thread(target=team.sleep, args=(board, 0, seen))
        sleeper.start()
        if not early:
            announce(board)
        sleeper.join(300)
        assert not sleeper.is_alive()
    assert board.words[team.CHANGES] == 50
    assert board.words[team.ASLEEP] == board.threads[team.SLEEPS] == 0
    assert not board.threads[team.SLEEP] & 0xFFFFFFFF  # what its semaphore counts


def test_threads_that_sleep_are_counted_before_they_can_be_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a wake between the two writes of a helper makes the count too small, and the leader is not woken."""
    board = team.new_board(3, 1)
    counts: list[int] = []

    def add(numbers: cpu_layout.Longs, index: int, value: int) -> int:
        numbers[index] += value
        others()
        return int(numbers[index] - value)

    def write(numbers: cpu_layout.Longs, index: int, value: int) -> None:
        numbers[index] = value
        others()

    def others() -> None:
        """Another thread wakes all that it sees asleep."""
        for each in range(0, len(board.threads), team.THREAD):
            if board.threads[each + team.SLEEPS]:
                board.threads[each + team.SLEEPS] = 0
                board.words[team.ASLEEP] -= 1
        counts.append(int(board.words[team.ASLEEP]))

    for name, function in {"add": add, "write": write, "read": lambda numbers, index: numbers[index]}.items():
        monkeypatch.setattr(team, name, function)
    monkeypatch.setattr(cores, "wait", lambda *_: True)
    monkeypatch.setattr(team, "replace", lambda *_: pytest.fail("it was woken"))
    for thread in (1, 2, 0):
        team.sleep.py_func(board, thread, 0)  # type: ignore[attr-defined]
    assert counts == [1, 0] * 3


@vector.compiled
def set_group(board: team.Board, group: int, by_rows: int, by_heads: int, loops: int) -> None:
    team.set_group(board, group, by_rows, by_heads, loops)


@vector.compiled
def take_piece(board: team.Board, group: int, generation: int) -> Any:
    return team.take(board, group, generation)


@vector.compiled
def finish_piece(board: team.Board, group: int, counter: int) -> None:
    team.finish(board, group, counter)


@vector.compiled
def announce(board: team.Board) -> None:
    team.announce(board)
