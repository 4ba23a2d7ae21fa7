"""A start with less memory than was thought."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine import loading
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.errors import ConfigError, NotEnoughMemory
from bdh_batch.settings import Engine, Scheduler, Settings

CONFIG = BDHConfig(n_layer=1, n_embd=8, n_head=1, mlp_internal_dim_multiplier=2, vocab_size=256)
CPU = torch.device("cpu")
MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(("fitting", "slots"), [(100, 64), (40, 32), (1, 1)])
def test_fewer_states_are_taken_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fitting: int, slots: int
) -> None:
    def scarce(config: BDHConfig, slots: int, *arguments: Any, **options: Any) -> StatePool:
        if slots > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return StatePool(config, slots, *arguments, **options)

    monkeypatch.setattr(loading, "StatePool", scarce)
    assert len(loading.take_states(CONFIG, 64, CPU, 0, torch.float32, 0).states) == slots
    assert ("cannot be allocated" in caplog.text) == (slots < 64)


def test_a_host_without_so_much_memory_does_not_cost_the_device_its_states(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def scarce(*arguments: Any, **options: Any) -> StatePool:
        if arguments[5] > 10:
            raise RuntimeError("CUDA error: out of memory for pinned pages")
        return StatePool(*arguments, **options)

    monkeypatch.setattr(loading, "StatePool", scarce)
    pool = loading.take_states(CONFIG, 64, CPU, 0, torch.float32, 32)
    assert (len(pool.states), pool.host_slots) == (64, 8)
    assert "cannot be allocated" in caplog.text


def test_slots_for_files_give_way_before_those_on_the_device_down_to_one_each_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scarce(*arguments: Any, **options: Any) -> StatePool:
        if arguments[5] + arguments[6] > 2:
            raise RuntimeError("CUDA error: out of memory for pinned pages")
        return StatePool(*arguments, **options)

    monkeypatch.setattr(loading, "StatePool", scarce)
    pool = loading.take_states(CONFIG, 64, CPU, 0, torch.float32, 4, 9)
    assert (len(pool.states), pool.host_slots, pool.transfer_slots) == (64, 0, 2)


def test_states_from_and_to_files_have_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: 100 * GIB)
    assert loading.transfer_budget(None, 24 * MIB) == 21
    assert loading.transfer_budget(None, 200 * MIB) == loading.transfer_budget(0, MIB) == 2
    assert loading.transfer_budget(None, 1024) == loading.transfer_budget(50 * GIB, MIB) == 64
    monkeypatch.setattr(loading, "free_memory", lambda device: GIB)
    assert loading.transfer_budget(None, 32 * MIB) == 4


def test_no_memory_at_all_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object, **options: object) -> StatePool:
        raise MemoryError

    monkeypatch.setattr(loading, "StatePool", none)
    with pytest.raises(ConfigError, match="state_memory"):
        loading.take_states(CONFIG, 64, CPU, 0, torch.float32, 0)


def test_states_that_leave_no_memory_for_steps_end_the_start() -> None:
    def warm(chunk: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    runner: Any = SimpleNamespace(warm=warm)
    with pytest.raises(NotEnoughMemory, match=r"^engine\.state_memory: .* \(CUDA out of memory\.\); set it lower"):
        loading.warm(runner, 512)


def budget(each: int, free: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    monkeypatch.setattr(loading, "free_memory", lambda device: free)
    return loading.state_budget(Engine(**options), CPU, each)


@pytest.mark.parametrize(
    ("free", "each", "options", "expected"),
    [
        (8 * GIB, MIB, {}, 2 * GIB),  # a quarter
        (100 * GIB, MIB, {}, 4 * GIB),
        (100 * GIB, 3 * GIB, {}, 12 * GIB),  # a few of a large model
        (10 * GIB, 3 * GIB, {}, 5 * GIB),
        (100 * GIB, MIB, {"state_memory_share": 0.5}, 50 * GIB),
        (100 * GIB, MIB, {"state_memory": 7 * GIB}, 7 * GIB),
    ],
)
def test_the_budget_is_modest_without_a_gpu_and_told_with_the_option_that_sets_it(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    each: int,
    options: dict[str, Any],
    expected: int,
) -> None:
    with caplog.at_level(logging.INFO):
        assert budget(each, free, monkeypatch, **options) == expected
    assert ("engine.state_memory sets it" in caplog.text) == ("state_memory" not in options)


def test_a_budget_above_what_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"engine\.state_memory: 2,147,483,648 bytes asked for, 1,073,741,824 are free"
    ):
        budget(MIB, GIB, monkeypatch, state_memory=2 * GIB)


@pytest.mark.parametrize(
    ("slots", "options", "running", "free_slots"),
    [
        (170, {}, 64, 85),
        (62, {}, 62, 62),
        (512, {}, 192, 256),
        (170, {"max_running": 96}, 96, 117),
        (170, {"max_running": 4}, 4, 85),
    ],
)
def test_sequences_leave_memory_for_cached_prefixes_unless_more_are_asked_for(
    slots: int, options: dict[str, Any], running: int, free_slots: int
) -> None:
    settings = Settings(scheduler=Scheduler(**options))
    model: Any = SimpleNamespace(config=BDHConfig())
    scheduler = loading.scheduler_for(settings, loading.LoadedEngine(model, model, slots, 0, grows=True))
    assert (scheduler.max_running, scheduler.policy.free_slots) == (running, free_slots)
    assert scheduler.policy.idle_release == settings.engine.idle_release_seconds
    on_gpu = loading.scheduler_for(settings, loading.LoadedEngine(model, model, slots, 0))
    assert (on_gpu.max_running, on_gpu.policy.free_slots) == (min(slots, options.get("max_running", 256)), None)
    assert on_gpu.policy.idle_release == 0
