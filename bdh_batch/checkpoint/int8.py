"""Weights as int8 with a scale for each column of D: the weights of one neuron in a matrix, of one token in the head.

A quantized file has an int8 matrix under its own key, and its scales beside it: `encoder` and `encoder_scales`, or
`encoder.0` and `encoder_scales.0`. The embedding, which is looked up, stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.checkpoint.dialects.keys import EMBED

LARGEST = 127


def scales_key(key: str) -> str:
    """The key of the scales of a matrix, or of the head."""
    name, dot, layer = key.partition(".")
    return f"{name}_scales{dot}{layer}"


def is_quantized(key: str) -> bool:
    """Whether a tensor of upstream's name is one of those that can be int8."""
    return key != EMBED


def across(key: str) -> int:
    """The axis of D in a matrix or the head."""
    return -1 if key.partition(".")[0] == "decoder" else -2


def scales_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    axis = across(key) % len(shape)
    return shape[:axis] + shape[axis + 1 :]


def quantize(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to multiples, −127 to 127, of its scales: of what is largest in each of its columns.

    Args:
        axis: of a column.

    Returns:
        The multiples as int8, and the scales as float32, without that axis. NaN and infinity show in these.
    """
    wide = tensor.float()
    scales = wide.abs().amax(dim=axis, keepdim=True) / LARGEST
    multiples = (wide / scales).nan_to_num(0.0, 0.0, 0.0).round()  # a column of zeros has the scale 0
    return multiples.to(torch.int8), scales.squeeze(axis)


def widen(multiples: Tensor, scales: Tensor, axis: int) -> Tensor:
    """The matrix as float32."""
    return multiples.float() * scales.unsqueeze(axis)


def bytes_of_weights(config: BDHConfig, dtype: torch.dtype) -> int:
    """What a model's matrices, head and embedding take in memory, as `model.dtype`."""
    shapes = config.shapes()
    if dtype != torch.int8:
        return sum(map(math.prod, shapes.values())) * dtype.itemsize
    wide = torch.float32.itemsize
    narrow = {key: shape for key, shape in shapes.items() if is_quantized(key)}
    scales = sum(math.prod(scales_shape(key, shape)) for key, shape in narrow.items())
    return wide * (math.prod(shapes[EMBED]) + scales) + sum(map(math.prod, narrow.values()))


def problems_of(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the scales of a file, in upstream's names."""
    problems = []
    for key, shape in expected.items():
        if not is_quantized(key):
            continue
        scales, of_int8 = state.get(scales_key(key)), key in state and state[key].dtype == torch.int8
        wanted = scales_shape(key, shape)
        if of_int8 and scales is None:
            problems.append(f"missing {scales_key(key)} {list(wanted)}, of {key}, which is int8")
        elif scales is not None and not of_int8:
            problems.append(f"extra {scales_key(key)}, as {key} is not int8")
        elif scales is not None and (scales.shape != wanted or scales.dtype != torch.float32):
            found = f"{list(scales.shape)} of {str(scales.dtype).removeprefix('torch.')}"
            problems.append(f"{scales_key(key)} is {found}, not {list(wanted)} of float32")
    return problems


def scale_keys(state: Mapping[str, Tensor], keys: Mapping[str, object]) -> list[str]:
    """The keys of the scales that a state has, of those of the model's tensors."""
    return [found for key in keys if (found := scales_key(key)) in state]
