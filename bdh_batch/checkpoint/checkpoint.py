"""Checkpoints to weights: every file that `files` reads and `dialects` understands, checked; and the native folder.

A native folder holds `config.json` (upstream's `BDHConfig` fields, perhaps `trained_context`), `model.safetensors`,
`tokenizer_config.json`, `generation_config.json` and perhaps `chat_template.jinja`; the last three are not read here.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bdh_batch.checkpoint.config import ROPE_THETA, BDHConfig, rope_frequencies
from bdh_batch.checkpoint.dialects import (
    EMBED,
    FREQUENCIES,
    HEAD,
    ROPE,
    Fields,
    Tensors,
    upstream_fields,
    upstream_tensors,
)
from bdh_batch.checkpoint.files import CONFIG, WEIGHTS, State, read_source
from bdh_batch.errors import CheckpointError
from bdh_batch.kernels.base import Weights
from bdh_batch.system.device_memory import free_memory
from bdh_batch.system.documents import listed, shown

log = logging.getLogger(__name__)

SPARE_KEYS = frozenset({FREQUENCIES, "lm_gate"})  # a constant, and a leftover of older upstream versions
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDING, SMALLEST = 2.0**-7, 1e-7  # what 16 bits lose of a frequency: bfloat16 relatively, float16's least numbers
UPSTREAM_LAYERS = BDHConfig().n_layer


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: its config, and its weights in memory."""

    config: BDHConfig
    weights: Weights


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds, in upstream's names: the right tensors in the right shapes, perhaps not yet read.

    `layers_known` is False where neither the file nor the caller gave the number of layers, and upstream's was taken.
    """

    file: Path
    config: BDHConfig
    state: State
    layers_known: bool

    def frequencies(self) -> Tensor:
        """RoPE's [N], float32. What was saved narrower has lost the phases: then they are computed anew."""
        neurons = self.config.neurons_per_head
        saved = self.state.get(FREQUENCIES)
        if saved is None or saved.dtype.itemsize < torch.float32.itemsize:
            return rope_frequencies(neurons)
        return saved.flatten().float()

    def check_finite(self) -> None:
        """Reads all weights.

        Raises:
            CheckpointError: some are NaN or infinite; the message counts them.
        """
        _check_finite({key: self.state[key] for key in self.config.shapes()}, self.file)


def fingerprint(weights: Weights) -> str:
    """Returns a hash of all that is in `weights`, as they are in memory."""
    digest = blake2b(digest_size=16)
    for field in fields(Weights):
        value = getattr(weights, field.name)
        if isinstance(value, Tensor):
            digest.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{field.name} {value}".encode())
    return digest.hexdigest()


def load_model(path: Path, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Model:
    """Reads a model folder, a `.pt` or a `.safetensors` file.

    Args:
        path: the folder or the file; a `config.json` beside a file goes before the config inside it.
        dtype: of the weights in memory; RoPE's frequencies stay float32.
        layers: for a file that does not say it: BDH's layers share one set of weights.

    Raises:
        CheckpointError: nothing there, unreadable, or with missing, extra or misshapen keys, every one of them listed.
    """
    checkpoint = open_checkpoint(path, layers)
    if not checkpoint.layers_known:
        name = checkpoint.file
        log.warning("%s does not say its number of layers: taking upstream's %d (model.layers)", name, UPSTREAM_LAYERS)
    _check_memory(checkpoint, dtype, device)
    # A copy always: what is only mapped would change with the file.
    state = {
        key: checkpoint.state[key].to(device=device, dtype=dtype, copy=True).contiguous()
        for key in checkpoint.config.shapes()
    }
    _check_finite(state, checkpoint.file)
    weights = Weights(
        layers=checkpoint.config.n_layer,
        embed=state[EMBED],
        encoder=state["encoder"][None],
        encoder_v=state["encoder_v"][None],
        decoder=state["decoder"][None],
        lm_head=state[HEAD],
        frequencies=checkpoint.frequencies().to(device, copy=True),
    )
    return Model(checkpoint.config, weights)


def open_checkpoint(path: Path, layers: int | None = None) -> Checkpoint:
    """As `load_model`, but leaves the tensors where and as they are; NaN is not looked for."""
    source = read_source(path)
    with _blaming(source.config_file):
        fields = None if source.values is None else upstream_fields(source.values)
    with _blaming(source.file):
        tensors = upstream_tensors(source.state, fields)
    with _blaming(source.config_file):
        config = None if fields is None else BDHConfig.from_dict(fields.values)
    with _blaming(source.file):
        given = _known_layers(fields, tensors, layers)
        config = _infer_config(tensors.state) if config is None else config
        config = replace(config, n_layer=given or UPSTREAM_LAYERS)
        _check(tensors, config, fields is not None and fields.rope)
    return Checkpoint(source.file, config, tensors.state, given is not None)


def save_model(folder: Path, config: BDHConfig, state: Mapping[str, Tensor], generation: Mapping[str, Any]) -> None:
    """Writes the native folder of a byte-level model; `generation` holds the sampling defaults it suggests.

    Where `state` has no frequencies of RoPE, they are upstream's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {FREQUENCIES: rope_frequencies(config.neurons_per_head).view(1, 1, 1, -1)} | dict(state)
    saved = {key: tensors[key].detach().contiguous() for key in (*config.shapes(), FREQUENCIES)}
    (folder / WEIGHTS).write_bytes(save(saved))
    for name, values in (
        (CONFIG, config.to_dict()),
        ("tokenizer_config.json", {"type": "byte"}),
        ("generation_config.json", dict(generation)),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _check_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    size = sum(checkpoint.state[key].numel() for key in checkpoint.config.shapes()) * dtype.itemsize
    if size > (free := free_memory(device)):
        text = f"its weights take {size:,} bytes in {_short(dtype)} (model.dtype), and {free:,} are free on {device}"
        raise CheckpointError(f"{checkpoint.file}: {text}")


@contextlib.contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Errors inside begin with the file that is at fault."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _known_layers(fields: Fields | None, tensors: Tensors, asked: int | None) -> int | None:
    given = {
        "its config": None if fields is None else fields.values.get("n_layer"),
        "its keys": tensors.layers,
        "model.layers": asked,
    }
    known = {who: layers for who, layers in given.items() if layers is not None}
    if len(set(known.values())) > 1:
        raise CheckpointError("how many layers? " + ", ".join(f"{who} says {layers}" for who, layers in known.items()))
    return next(iter(known.values()), None)


def _infer_config(state: State) -> BDHConfig:
    encoder, embed = state.get("encoder"), state.get(EMBED)
    if encoder is None or embed is None or encoder.ndim != 3 or embed.ndim != 2:
        raise CheckpointError(
            f"no {CONFIG} beside it, and without encoder [heads, D, N] and embed.weight [V, D] none can be "
            f"inferred; found {_listing(state)}"
        )
    heads, width, neurons = encoder.shape
    if not width or heads * neurons % width:
        raise CheckpointError(f"encoder {list(encoder.shape)} has {heads * neurons} neurons, no multiple of its width")
    return BDHConfig(
        n_embd=width, n_head=heads, mlp_internal_dim_multiplier=heads * neurons // width, vocab_size=embed.shape[0]
    )


def _check(tensors: Tensors, config: BDHConfig, rope_known: bool) -> None:
    state, expected = tensors.state, config.shapes()

    def name(key: str) -> str:
        origin = tensors.origins.get(key, key)
        return shown(key) if origin == key else f"{shown(origin)} ({shown(key)})"

    problems = [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in state]
    problems += [f"extra {name(key)}" for key in sorted(state.keys() - expected.keys() - SPARE_KEYS)]
    present = {key: state[key] for key in expected if key in state}
    problems += [
        f"{name(key)} has shape {list(tensor.shape)}, not {list(expected[key])}"
        for key, tensor in present.items()
        if tensor.shape != expected[key]
    ]
    problems += [
        f"{name(key)} holds {_short(tensor.dtype)}, not floats of 16, 32 or 64 bits"
        for key, tensor in present.items()
        if tensor.dtype not in DTYPES
    ]
    if FREQUENCIES in state:
        problems += [f"{name(FREQUENCIES)} {problem}" for problem in _frequency_problems(state[FREQUENCIES], config)]
    elif not rope_known:
        problems.append(
            f"missing {FREQUENCIES} [1, 1, 1, {config.neurons_per_head}], without which RoPE is not known; where it is "
            f'upstream\'s, say so by "{ROPE}": {ROPE_THETA:.0f} in {CONFIG}'
        )
    if problems:
        raise CheckpointError(listed(problems))


def _frequency_problems(saved: Tensor, config: BDHConfig) -> list[str]:
    """The phases are part of the model: others than upstream's are served as they are, if they are RoPE's at all."""
    if saved.numel() != config.neurons_per_head:
        return [f"has {saved.numel()} elements, not {config.neurons_per_head}"]
    if saved.dtype not in DTYPES:
        return [f"holds {_short(saved.dtype)}, not floats of 16, 32 or 64 bits"]
    turns = saved.flatten().float()
    if not turns.isfinite().all() or not torch.equal(turns[::2], turns[1::2]):
        return ["should be finite, and the same for neurons 2i and 2i + 1"]
    narrow = saved.dtype.itemsize < torch.float32.itemsize
    if narrow and not torch.allclose(turns, rope_frequencies(len(turns)), ROUNDING, SMALLEST):
        return [f"is in {_short(saved.dtype)}, which is too coarse, and is not upstream's; save it in float32"]
    return []


def _check_finite(state: Mapping[str, Tensor], file: Path) -> None:
    bad = {key: int(tensor.numel() - tensor.isfinite().sum()) for key, tensor in state.items()}
    problems = [
        f"{key} has {count} numbers of {state[key].numel()} that are NaN or infinite in {_short(state[key].dtype)}"
        for key, count in bad.items()
        if count
    ]
    if problems:
        raise CheckpointError(f"{file}: " + listed(problems))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listing(state: State) -> str:
    return listed((f"{shown(key)} {list(tensor.shape)}" for key, tensor in sorted(state.items())), ", ") or "nothing"
