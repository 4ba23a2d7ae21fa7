"""A start with less memory than was thought."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bdh_batch import runtime
from bdh_batch.errors import ConfigError
from bdh_batch.model.config import BDHConfig
from bdh_batch.model.state import StatePool

CONFIG = BDHConfig(n_layer=1, n_embd=8, n_head=1, mlp_internal_dim_multiplier=2, vocab_size=256)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("fitting", "slots"), [(100, 64), (40, 32), (1, 1)])
def test_fewer_states_are_taken_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fitting: int, slots: int
) -> None:
    def scarce(config: BDHConfig, slots: int, *arguments: Any) -> StatePool:
        if slots > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return StatePool(config, slots, *arguments)

    monkeypatch.setattr(runtime, "StatePool", scarce)
    assert len(runtime.take_states(CONFIG, 64, CPU, 0, torch.float32, 0).states) == slots
    assert ("cannot be had" in caplog.text) == (slots < 64)


def test_a_host_without_so_much_memory_does_not_cost_the_device_its_states(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def scarce(*arguments: Any) -> StatePool:
        if arguments[-1] > 10:
            raise RuntimeError("CUDA error: out of memory for pinned pages")
        return StatePool(*arguments)

    monkeypatch.setattr(runtime, "StatePool", scarce)
    pool = runtime.take_states(CONFIG, 64, CPU, 0, torch.float32, 32)
    assert (len(pool.states), pool.host_slots) == (64, 8)
    assert "cannot be had" in caplog.text


def test_no_memory_at_all_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> StatePool:
        raise MemoryError

    monkeypatch.setattr(runtime, "StatePool", none)
    with pytest.raises(ConfigError, match="state_memory"):
        runtime.take_states(CONFIG, 64, CPU, 0, torch.float32, 0)
