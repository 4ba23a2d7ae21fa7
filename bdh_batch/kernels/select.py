"""Chooses an implementation, once, at start-up, and says why. What cannot be served is refused, never replaced."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch

from bdh_batch.errors import ConfigError
from bdh_batch.kernels.base import Kernels, Weights
from bdh_batch.kernels.cache import choose_triton_cache
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.cpu_layout import ROUNDING
from bdh_batch.kernels.torch_reference import TorchKernels

Choice = Literal["auto", "torch", "cpu", "triton"]
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_WIDEST = 512  # hidden vector that the Triton kernels tile
OLDEST_GPU = (8, 0)  # compute capability; the Triton kernels use its tensor cores


def select_kernels(
    name: Choice,
    weights: Weights,
    window: int,
    state_dtype: torch.dtype = torch.float32,
    latent: bool = False,
) -> tuple[Kernels, str]:
    """The kernels for a model, and the reason for them in a few words.

    Args:
        name: the setting `engine.kernels`.
        window: the setting `model.attention_window`; 0 attends to everything.
        state_dtype: the setting `engine.state_dtype`.
        latent: whether the model has latent steps.

    Raises:
        ConfigError: these kernels cannot serve this model, here.
    """
    kernels, reason = _select(name, weights, window, latent)
    if state_dtype != torch.float32 and isinstance(kernels, TorchKernels):
        raise ConfigError(
            "engine.state_dtype: the torch kernels round to the nearest, and a state in bfloat16 then loses what it "
            f"should add up; set it to float32, or engine.kernels to others ({reason})"
        )
    return kernels, reason


def _select(name: Choice, weights: Weights, window: int, latent: bool) -> tuple[Kernels, str]:
    _check_window(window)
    _check_pairs(weights)
    if name == "torch":
        return TorchKernels(weights, window), "torch: engine.kernels asks for the reference"
    if name == "cpu":
        _check_cpu(weights)
        return _cpu(weights, window, "engine.kernels asks for it")
    if name == "triton":
        if obstacle := triton_obstacle(weights):
            raise ConfigError(f"engine.kernels: triton kernels {obstacle}")
        return _triton(weights, window, latent), "triton: engine.kernels asks for it"
    if name == "auto":
        return _automatic(weights, window, latent)
    raise ConfigError(f"engine.kernels: {name!r} is not one of auto, torch, cpu, triton")


def _automatic(weights: Weights, window: int, latent: bool) -> tuple[Kernels, str]:
    device = weights.embed.device.type
    if device == "cpu":
        _check_cpu(weights)
        return _cpu(weights, window, "the weights are in main memory")
    if device != "cuda":
        return TorchKernels(weights, window), f"torch: there are no other kernels for {device}"
    if obstacle := triton_obstacle(weights):
        if weights.dtype == torch.int8:  # which the reference would widen for every product
            raise ConfigError(f"model.dtype: int8 is for CPUs; on a GPU, triton kernels {obstacle}")
        return TorchKernels(weights, window), f"torch: triton kernels {obstacle}"
    return _triton(weights, window, latent), "triton: the weights are on a GPU"


def _cpu(weights: Weights, window: int, reason: str) -> tuple[Kernels, str]:
    """The CPU's kernels; the reason says how they multiply narrow weights, which may follow from the processor."""
    kernels = CpuKernels(weights, window)
    dtype = str(weights.dtype).removeprefix("torch.")
    if weights.dtype == torch.int8:
        reason += f"; weights of {dtype} stay so, and are multiplied with inputs of int16"
    elif kernels.pairs:
        reason += f"; weights of {dtype} stay so, and are multiplied by avx512_bf16"
    elif weights.dtype == torch.bfloat16:
        reason += f"; weights of {dtype} are widened to float32, as this processor has no avx512_bf16"
    elif weights.dtype != torch.float32:
        reason += f"; weights of {dtype} are widened to float32"
    return kernels, f"cpu: {reason}"


def triton_obstacle(weights: Weights) -> str | None:
    """Why the Triton kernels cannot serve a model here, and what to change; None where they can."""
    device, dtype, width = weights.embed.device, weights.dtype, weights.encoder.shape[2]
    if device.type != "cuda":
        return f"cannot read weights on {device.type}; set model.device to cuda, or engine.kernels to auto"
    if find_spec("triton") is None:
        return "need Triton, which is not installed: pip install 'bdh-batch[cuda]', or set engine.kernels to torch"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return (
            "need a GPU of compute capability 8.0 or later; set engine.kernels to torch, or choose another model.device"
        )
    if dtype not in TRITON_DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in TRITON_DTYPES)
        return f"know weights of {known}, not {str(dtype).removeprefix('torch.')}; set model.dtype to one of them"
    if width > TRITON_WIDEST:
        return f"tile hidden vectors of at most {TRITON_WIDEST} numbers, not {width}; set engine.kernels to torch"
    return None


def _triton(weights: Weights, window: int, latent: bool) -> Kernels:
    """Imported when it is chosen: where Triton is not installed, the rest works."""
    if folder := choose_triton_cache():
        os.environ["TRITON_CACHE_DIR"] = folder
    from bdh_batch.kernels.cuda import TritonKernels

    return TritonKernels(weights, window, latent=latent)


def _check_window(window: int) -> None:
    if window < 0 or window % 2:
        raise ConfigError(
            f"model.attention_window: {window} is not an even number of tokens, which two blocks could share; "
            "0 turns it off"
        )


def _check_pairs(weights: Weights) -> None:
    neurons = weights.encoder.shape[-1]
    if neurons % 2:
        raise ConfigError(f"engine.kernels: no kernels for heads of {neurons} neurons, an odd number: RoPE turns pairs")


def _check_cpu(weights: Weights) -> None:
    device, dtype = weights.embed.device.type, weights.dtype
    if device != "cpu":
        raise ConfigError(f"engine.kernels: cpu kernels cannot read weights on {device}; set engine.kernels to auto")
    if dtype not in ROUNDING:
        known = ", ".join(str(known).removeprefix("torch.") for known in ROUNDING)
        raise ConfigError(
            f"engine.kernels: cpu kernels know weights of {known}, not {str(dtype).removeprefix('torch.')}"
        )
