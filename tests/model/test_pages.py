from __future__ import annotations

import mmap
import resource
import sys
from pathlib import Path

import pytest
import torch

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine import pages
from bdh_batch.engine.pages import PagesAhead
from bdh_batch.engine.state_pool import StatePool
from tests.support import resident

PAGES = 64  # of 4 KiB in a block

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="backs memory by a call of Linux")


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def test_what_is_backed_ahead_is_written_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "AHEAD", 4 * PAGES * 4096)
    memory = mmap.mmap(-1, 200 * PAGES * 4096)  # pages that nothing has touched, as torch's need not be
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    blocks = torch.frombuffer(memory, dtype=torch.float32).view(200, -1)
    blocks[0] = 7.0
    ahead = PagesAhead(blocks)
    ahead.used(0)
    while ahead.back(idle=True):
        pass
    assert (blocks[0] == 7.0).all()
    before = faults()
    blocks[1:5].fill_(1.0)
    backed = faults() - before
    before = faults()
    blocks[100:104].fill_(1.0)
    assert backed < 20 < faults() - before


def test_it_backs_a_huge_page_at_a_time_the_next_block_first_and_more_when_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    def advise(start: int, size: int, advice: int | None) -> bool:
        asked.append((start, size))
        return True

    monkeypatch.setattr(pages, "_advise", advise)
    blocks = torch.empty((100, 3 * 2**19))  # each of three huge pages
    base = blocks.data_ptr()
    ahead = PagesAhead(blocks)
    ahead.begin()
    assert asked == [(base + at * pages.HUGE, pages.HUGE) for at in range(6)]  # two blocks
    ahead.used(0)
    assert not ahead.back(idle=False)
    ahead.used(1)
    asked.clear()
    while ahead.back(idle=False):
        pass
    assert asked == [(base + at * pages.HUGE, pages.HUGE) for at in range(6, 9)]
    while ahead.back(idle=True):
        pass
    assert sum(size for _, size in asked) == pages.MOST_AHEAD * blocks[0].nbytes
    ahead.used(50)  # what lies before it is not backed any more: it is in use, or will be
    asked.clear()
    assert ahead.back(idle=True)
    assert asked == [(base + 51 * 3 * pages.HUGE, pages.HUGE)]


def test_it_goes_to_the_last_block_and_no_further() -> None:
    blocks = torch.empty((5, 3000))  # that do not begin where pages do
    ahead = PagesAhead(blocks)
    for block in (0, 4, 2):
        ahead.used(block)
        while ahead.back(idle=True):
            pass
    assert (ahead._used, ahead._backed) == (5, blocks.nbytes)


def test_a_system_that_cannot_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(start: int, size: int, advice: int | None) -> bool:
        asked.append(start)
        return False

    monkeypatch.setattr(pages, "_advise", refuse)
    ahead = PagesAhead(torch.empty((500_000, 4)))
    for block in (0, 400_000):
        ahead.used(block)
        assert not ahead.back(idle=True)
    assert len(asked) == 1


@pytest.mark.parametrize("huge", [True, False])
def test_reserved_memory_is_aligned_and_zero_and_takes_none_until_it_is_written(huge: bool) -> None:
    blocks = pages.reserve((4, 2**20), torch.float32, huge)
    assert blocks.data_ptr() % pages.HUGE == 0
    assert [resident(block) for block in blocks] == [0, 0, 0, 0]
    blocks[1] = 1.0
    assert [resident(block) for block in blocks] == [0, 2**22, 0, 0]
    assert blocks.sum() == 2**20


def test_released_memory_is_gone_and_zero_and_neighbours_keep_theirs() -> None:
    blocks = pages.reserve((3, 2**20), torch.float32).fill_(5.0)
    assert pages.release(blocks[1])
    assert [resident(block) for block in blocks] == [2**22, 0, 2**22]
    assert [block.unique().tolist() for block in blocks] == [[5.0], [0.0], [5.0]]


def test_a_block_that_shares_its_pages_with_others_is_released_without_harm_to_them() -> None:
    blocks = pages.reserve((5, 3000), torch.float32).fill_(5.0)
    assert pages.release(blocks[2])
    assert (blocks[[0, 1, 3, 4]] == 5.0).all()


def test_memory_that_cannot_be_promised_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="cannot be allocated"):
        pages.reserve((2**60,), torch.float32)


def test_a_pool_gives_slots_back_and_clears_them_for_the_next() -> None:
    config = BDHConfig(n_layer=2, n_embd=64, n_head=2, mlp_internal_dim_multiplier=64, vocab_size=256)
    pool = StatePool(config, 4, torch.device("cpu"))
    pool.states.fill_(torch.nan)
    pool.release(2)
    assert [resident(state) for state in pool.states] == [pool.states[0].nbytes * (at != 2) for at in range(4)]
    for slot in (1, 2):
        pool.clear(slot)
        assert not pool.states[slot].any()
    assert pool.states[3].isnan().all()


def test_a_pool_that_is_warm_has_memory_for_the_first_states() -> None:
    config = BDHConfig(n_layer=2, n_embd=64, n_head=2, mlp_internal_dim_multiplier=64, vocab_size=256)
    pool = StatePool(config, 64, torch.device("cpu"), transfer_slots=4)
    pool.warm()
    each = pool.states[0].nbytes
    assert [resident(pool.states[at]) for at in range(2)] == [each, each]
    assert pool.memory(64).nbytes == each
    transfers = [resident(pool._transfer[at]) for at in range(4)]
    assert transfers[:2] == [each, each]
    assert transfers[3] == 0


@pytest.mark.parametrize("host_dtype", [None, torch.int8])
def test_a_state_that_moves_changes_memory_with_the_slot_that_it_comes_to(host_dtype: torch.dtype | None) -> None:
    config = BDHConfig(n_layer=2, n_embd=64, n_head=2, mlp_internal_dim_multiplier=64, vocab_size=256)
    pool = StatePool(config, 2, torch.device("cpu"), host_slots=1, transfer_slots=2, host_dtype=host_dtype)
    pool.rows[:] = torch.arange(4.0).view(4, 1, 1, 1, 1)
    read, kept, slot = 4, 3, 1  # two transfer slots, and one on the device
    before = pool.rows.clone()
    pool.copy(read, slot, moves=True)
    assert torch.equal(pool.rows, before)
    assert [float(pool.rows[pool.row(each)].max()) for each in (0, slot)] == [0.0, 3.0]
    assert {*torch.frombuffer(pool.memory(kept), dtype=torch.float32).tolist()} == {2.0}
    pool.copy(slot, read)  # its memory is another one now
    pool.clear(slot)
    assert {*torch.frombuffer(pool.memory(read), dtype=torch.float32).tolist()} == {3.0}
    assert not pool.rows[pool.row(slot)].any()
    pool.copy(read, 2)  # the host's
    pool.copy(2, 0)
    torch.testing.assert_close(pool.states[0], torch.full_like(pool.states[0], 3.0), rtol=0, atol=1e-5)
    pool.release(read)
    assert [round(float(row.max())) for row in pool.rows[:3]] == [3, 0, 2]


def test_huge_pages_are_told_where_the_system_gives_them(tmp_path: Path) -> None:
    block = pages.reserve((2**20,), torch.float32).fill_(1.0)
    begin = block.data_ptr()
    maps = tmp_path / "smaps"
    text = "{:x}-{:x} rw-p 00000000 00:00 0 \nSize: 4 kB\nAnonHugePages:    {} kB\n"
    maps.write_text(text.format(begin - 8, begin, 1) + text.format(begin, begin + 8, 4096) + text.format(1, 2, 3))
    assert pages.in_huge_pages(block, maps) == 4096 * 1024
    assert pages.in_huge_pages(block, tmp_path / "none") == 0
    assert pages.in_huge_pages(block) >= 0
