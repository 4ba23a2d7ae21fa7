"""Where the CPU's kernels have threads of their own, torch's operators take none from beside a step."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from bdh_batch import settings
from bdh_batch.engine.loading import load_engine, start_worker
from bdh_batch.scheduler.sequence import Sequence
from tests.scheduler.fakes import FakeObserver, make_sequence

TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
WITHIN = 300.0  # seconds; a hang is a failure


class Waiting(FakeObserver):
    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def finished(self, sequence: Sequence, now: float) -> None:
        self.ended.set()


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
async def test_torch_keeps_to_one_thread_where_steps_are_computed_and_nowhere_else(kernels: str) -> None:
    chosen = settings.load(None, [("model.path", str(TINY)), ("engine.kernels", kernels)]).settings
    engine, observer, found = load_engine(chosen, TINY), Waiting(), list[int]()
    threads = torch.get_num_threads()
    worker = start_worker(chosen, engine, observer, lambda step: found.append(torch.get_num_threads()))
    worker.submit([make_sequence([1, 2, 3], 4)])
    assert await asyncio.to_thread(observer.ended.wait, WITHIN)
    worker.close()
    assert set(found) == {1 if kernels == "cpu" else threads}
    another = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    another.start()
    another.join()
    assert found[-1] == torch.get_num_threads() == threads
