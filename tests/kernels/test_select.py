from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bdh_batch.checkpoint.config import bytes_per_sequence
from bdh_batch.engine.loading import set_threads
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.errors import ConfigError
from bdh_batch.kernels import select
from bdh_batch.kernels.base import Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.select import select_kernels
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import CPU, model

CONFIG = model(1, 2, 16, 32, 20)


@pytest.fixture
def weights() -> Weights:
    return synthetic_weights(CONFIG, 0.3)


def elsewhere(weights: Weights) -> Weights:
    """Weights that are not in main memory, as on a GPU."""
    names = ("embed", "encoder", "encoder_v", "decoder", "lm_head", "frequencies")
    return replace(weights, **{name: getattr(weights, name).to("meta") for name in names})


def test_auto_takes_the_cpu_kernels_for_weights_in_main_memory(weights: Weights) -> None:
    kernels, reason = select_kernels("auto", weights, 0)
    assert isinstance(kernels, CpuKernels)
    assert reason == "cpu: the weights are in main memory"


def test_auto_says_why_it_takes_the_reference(weights: Weights) -> None:
    kernels, reason = select_kernels("auto", elsewhere(weights), 0)
    assert isinstance(kernels, TorchKernels)
    assert reason == "torch: there are no other kernels for meta"


def test_a_choice_is_kept(weights: Weights) -> None:
    assert isinstance(select_kernels("cpu", weights, 8)[0], CpuKernels)
    assert isinstance(select_kernels("torch", weights, 8)[0], TorchKernels)


def test_what_cannot_be_served_is_refused(weights: Weights) -> None:
    unknown: Any = "numpy"
    with pytest.raises(ConfigError, match=r"engine\.kernels: 'numpy' is not one of auto, torch, cpu, triton"):
        select_kernels(unknown, weights, 0)
    with pytest.raises(ConfigError, match=r"engine\.kernels: cpu kernels cannot read weights on meta"):
        select_kernels("cpu", elsewhere(weights), 0)
    with pytest.raises(ConfigError, match=r"engine\.kernels: cpu kernels know weights of .*, not float64"):
        select_kernels("cpu", replace(weights, encoder=weights.encoder.double()), 0)
    with pytest.raises(ConfigError, match=r"engine\.kernels: no kernels for heads of 31 neurons"):
        select_kernels("auto", replace(weights, encoder=weights.encoder[..., :31]), 0)


class OnGpu:
    """Stands for weights on a GPU that this machine does not have."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 16) -> None:
        self.embed = SimpleNamespace(device=torch.device("cuda"))
        self.encoder = torch.empty(1, 2, width, 32, device="meta")
        self.dtype = dtype


@pytest.mark.parametrize(
    ("gpu", "installed", "capability", "reason"),
    [
        (OnGpu(), True, (9, 0), None),
        (OnGpu(), False, (9, 0), r"need Triton, which is not installed"),
        (OnGpu(), True, (7, 5), r"capability 8\.0 or later; set engine\.kernels to torch"),
        (OnGpu(dtype=torch.int8), True, (9, 0), r"not int8; set model\.dtype"),
        (OnGpu(dtype=torch.float64), True, (9, 0), r"not float64; set model\.dtype"),
        (OnGpu(width=513), True, (9, 0), r"at most 512 numbers, not 513; set engine\.kernels"),
    ],
)
def test_what_triton_cannot_serve(
    gpu: Any, installed: bool, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(select, "_triton", lambda weights, window, latent: ("triton kernels", latent))
    monkeypatch.setattr(select, "TorchKernels", lambda weights, window: "reference")
    obstacle = select.triton_obstacle(gpu)
    chosen: list[object] = []
    if gpu.dtype == torch.int8:
        with pytest.raises(ConfigError, match=r"model\.dtype: int8 is for CPUs; .*, not int8; set model\.dtype"):
            select_kernels("auto", gpu, 0)
    else:
        chosen.append(select_kernels("auto", gpu, 0))
    if reason is None:
        assert obstacle is None
        chosen.append(select_kernels("triton", gpu, 0, latent=True))
        assert chosen == [
            (("triton kernels", False), "triton: the weights are on a GPU"),
            (("triton kernels", True), "triton: engine.kernels asks for it"),
        ]
    else:
        assert obstacle is not None
        assert re.search(reason, obstacle)
        if gpu.dtype != torch.int8:
            assert chosen == [("reference", f"torch: triton kernels {obstacle}")]
        with pytest.raises(ConfigError, match=reason):
            select_kernels("triton", gpu, 0)


def test_triton_needs_a_gpu(weights: Weights) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kernels: .* weights on cpu; set model\.device to cuda"):
        select_kernels("triton", weights, 0)


@pytest.mark.parametrize("window", [-2, 7])
def test_a_window_that_has_no_two_blocks_is_refused(weights: Weights, window: int) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention_window"):
        select_kernels("auto", weights, window)


def test_the_reference_does_not_serve_narrow_states(weights: Weights) -> None:
    with pytest.raises(ConfigError, match=r"engine\.state_dtype"):
        select_kernels("torch", weights, 0, torch.bfloat16)
    kernels, _ = select_kernels("cpu", weights, 0, torch.bfloat16)
    assert isinstance(kernels, CpuKernels)


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.threads: 100000 asked for"):
        set_threads(100_000)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pool_holds_what_it_says(window: int, dtype: torch.dtype) -> None:
    pool = StatePool(CONFIG, 3, CPU, window, dtype)
    assert pool.states[0].is_contiguous()
    assert pool.states.nbytes == 3 * bytes_per_sequence(CONFIG, window, dtype)
    pool.states[:] = 1
    pool.clear(1)
    assert torch.equal(pool.states.flatten(1).sum(1) == 0, torch.tensor([False, True, False]))
