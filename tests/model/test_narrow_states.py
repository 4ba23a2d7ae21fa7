"""States of cached prefixes in fewer bits: how far they are from what they were, and that running ones stay exact."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine import loading
from bdh_batch.engine.narrow_states import NarrowStates, narrow_bytes
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.scheduler.invariants import check_invariants
from bdh_batch.settings import PrefixCache
from tests.model.test_saved_states import TEXT, deltas_of, request, rest, said, start

CPU = torch.device("cpu")
SHAPE = (3, 2, 40, 16)
CONFIG = BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)


def states(dtype: torch.dtype, slots: int = 2) -> NarrowStates:
    return NarrowStates((slots, *SHAPE), dtype, lambda shape, kind: torch.full(tuple(shape), 77, dtype=kind))


def restored(state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow, into = states(dtype), torch.full_like(state, torch.nan)
    narrow.store(1, state)
    narrow.restore(1, into)
    return into


@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16])
def test_int8_is_off_by_half_a_step_of_its_row_at_most(running: torch.dtype) -> None:
    torch.manual_seed(0)
    state = (torch.randn(SHAPE) * torch.logspace(-20, 20, 40)[:, None]).to(running)
    state[0, 0, 0], state[1, 1, 3] = 0.0, 1e-40  # a scale of such numbers is none
    wide, found = state.double(), restored(state, torch.int8).double()
    step = wide.abs().amax(dim=-1, keepdim=True) / 127
    rounding = 2.0**-8 if running == torch.bfloat16 else 1e-6  # of the product that is written back
    assert ((found - wide).abs() <= step / 2 * (1 + 1e-4) + rounding * wide.abs() + 1e-37).all()
    assert (found[0, 0, 0] == 0).all()


def test_bfloat16_rounds_to_the_nearest() -> None:
    state = torch.randn(SHAPE)
    torch.testing.assert_close(restored(state, torch.bfloat16), state.bfloat16().float(), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_what_is_stored_takes_the_bytes_that_are_counted(dtype: torch.dtype) -> None:
    narrow = states(dtype, 5)
    tensors = [narrow._values] + ([] if narrow._scales is None else [narrow._scales])
    assert sum(tensor.nbytes for tensor in tensors) == 5 * narrow_bytes(SHAPE, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("window", [0, 32])
def test_slots_of_all_kinds_are_copied_to_each_other(dtype: torch.dtype, window: int) -> None:
    pool = StatePool(CONFIG, 2, CPU, window, host_slots=2, transfer_slots=2, host_dtype=dtype)
    assert (pool.host_slots, pool.transfer_slots) == (2, 2)
    pool.states[0].normal_()
    for source, target in ((0, 3), (3, 1), (0, 5), (5, 2), (2, 4)):  # device, host, transfer
        pool.copy(source, target)
    for slot in (1, 4):
        close = (pool._slot(slot) - pool.states[0]).abs().max() / pool.states[0].abs().max()
        assert 0 < close < 0.01
    torch.testing.assert_close(pool._slot(5), pool.states[0], atol=0, rtol=0)
    torch.testing.assert_close(pool._slot(4), pool.states[1], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
async def test_cached_prefixes_are_narrow_and_running_sequences_are_not(dtype: torch.dtype) -> None:
    exact = start(slots=2, cached=False)
    prompts = [[*TEXT, number, number] for number in range(6)]
    alone = [await said(exact, request(prompt, 30)) for prompt in prompts]
    exact.worker.close()
    engine = start(slots=2, host_slots=4, host_dtype=dtype, time_slice=2)
    # Each for itself, so that none begins in what another one has left.
    salted = [request(prompt, 30, salt=str(number)) for number, prompt in enumerate(prompts)]
    assert await asyncio.gather(*(said(engine, each) for each in salted)) == alone
    for each in salted[:3]:  # what has been used goes to the host when it has to make room, and is found there
        for _ in range(2):
            await said(engine, each)
    hosted = [entry for entry in engine.scheduler.sharing.cache if entry.slot >= 2]
    again = [(await deltas_of(engine, each))[1][0] for each in salted[:3]]
    assert hosted
    assert sum(cached > len(TEXT) for cached in again) >= 2
    await rest(engine)
    check_invariants(engine.scheduler)
    engine.worker.close()


@pytest.mark.parametrize(
    ("asked", "running", "found"),
    [
        (None, torch.float32, None),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("bfloat16", torch.bfloat16, None),
        ("int8", torch.bfloat16, torch.int8),
    ],
)
def test_only_what_is_narrower_is_another_dtype(asked: Any, running: torch.dtype, found: torch.dtype | None) -> None:
    assert loading.narrow_dtype(PrefixCache(dtype=asked), running) == found


def test_without_a_gpu_narrow_prefixes_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: 2**31)
    assert loading.host_budget(PrefixCache(), CPU, 0) == 0
    assert loading.host_budget(PrefixCache(dtype="int8"), CPU, 0) == 2**29
