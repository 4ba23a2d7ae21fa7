from __future__ import annotations

import resource
import sys

import pytest
import torch

from bdh_batch.model import pages
from bdh_batch.model.pages import PagesAhead

PAGES = 64  # of 4 KiB in a block

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="backs memory by a call of Linux")


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def finish(ahead: PagesAhead) -> None:
    if (thread := ahead._thread) is not None:
        thread.join()


def test_what_is_backed_ahead_is_written_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "AHEAD", 4 * PAGES * 4096)
    blocks = torch.empty((200, PAGES * 1024))
    blocks[0] = 7.0
    ahead = PagesAhead(blocks)
    ahead.used(0)
    finish(ahead)
    assert (blocks[0] == 7.0).all()
    before = faults()
    blocks[1:8].fill_(1.0)
    backed = faults() - before
    before = faults()
    blocks[100:107].fill_(1.0)
    assert backed < 20 < faults() - before


def test_it_goes_to_the_last_block_and_no_further() -> None:
    blocks = torch.empty((5, 3000))  # that do not begin where pages do
    ahead = PagesAhead(blocks)
    for block in (0, 4, 2):
        ahead.used(block)
        finish(ahead)
    assert (ahead._wanted, ahead._backed) == (5, 5)


def test_a_system_that_cannot_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def refuse(block: torch.Tensor) -> bool:
        asked.append(block)
        return False

    monkeypatch.setattr(pages, "populate", refuse)
    ahead = PagesAhead(torch.empty((500_000, 4)))
    for block in (0, 400_000):
        ahead.used(block)
        finish(ahead)
    assert len(asked) == 1
