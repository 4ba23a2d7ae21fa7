"""Model files to weights and back: the native folder, and the `.pt` files that upstream and trainers leave.

A native folder holds `config.json` (upstream's `BDHConfig` fields, perhaps `trained_context`), `model.safetensors`,
`tokenizer_config.json`, `generation_config.json` and perhaps `chat_template.jinja`; the last three are not read here.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bdh_batch.errors import CheckpointError
from bdh_batch.kernels.base import Weights
from bdh_batch.model.config import BDHConfig, rope_frequencies

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FREQUENCIES = "attn.freqs"
SPARE_KEYS = frozenset({FREQUENCIES, "lm_gate"})  # a constant, and a leftover of older upstream versions
COMPILED_PREFIX = "_orig_mod."  # torch.compile's
UPSTREAM_LAYERS = BDHConfig().n_layer

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Model:
    config: BDHConfig
    weights: Weights


def load_model(path: Path, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Model:
    """Reads a model folder, a `.pt` or a `.safetensors` file.

    Args:
        path: the folder or the file; a file finds its `config.json` beside it, if it does not bear a config itself.
        dtype: of the weights in memory; RoPE's frequencies stay float32.
        layers: for a bare state dict, whose shapes do not tell it (BDH's layers share one set of weights).

    Raises:
        CheckpointError: nothing there, unreadable, or with missing, extra or misshapen keys, every one of them listed.
    """
    file, config_file = _locate(path)
    state, values = _read(file)
    if config_file.is_file():
        values = _read_config(config_file)
    state = {key.removeprefix(COMPILED_PREFIX): tensor for key, tensor in state.items()}
    config = BDHConfig.from_dict(values) if values is not None else _infer_config(state, layers, file)
    _check(state, config, file)
    return Model(config, _weights(state, config, dtype, device))


def save_model(folder: Path, config: BDHConfig, state: Mapping[str, Tensor], generation: Mapping[str, Any]) -> None:
    """Writes the native folder of a byte-level model; `generation` holds the sampling defaults it suggests."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save({key: state[key].detach().contiguous() for key in config.shapes()}))
    for name, values in (
        (CONFIG, config.to_dict()),
        ("tokenizer_config.json", {"type": "byte"}),
        ("generation_config.json", dict(generation)),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def _locate(path: Path) -> tuple[Path, Path]:
    """The file with the tensors, and where its config would be."""
    if path.is_file():
        return path, path.parent / CONFIG
    if not path.is_dir():
        raise CheckpointError(f"model.path: there is no model at {path}")
    if (path / WEIGHTS).is_file():
        found = [path / WEIGHTS]
    else:
        found = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "neither"
        raise CheckpointError(f"model.path: {path} should hold {WEIGHTS} or one .pt file; found {names}")
    if found[0].name == WEIGHTS and not (path / CONFIG).is_file():
        raise CheckpointError(f"model.path: {path} has no {CONFIG}")
    return found[0], path / CONFIG


def _read(file: Path) -> tuple[State, dict[str, Any] | None]:
    """The tensors, and the config that a trainer put beside them."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file), None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged, or not a safetensors file ({error})") from error
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: holds pickled objects besides tensors, which are not loaded because they can run code. "
            "Where you trust the file, load and rewrite it: "
            'torch.save({"model": model.state_dict(), "config": dataclasses.asdict(config)}, …)'
        ) from error
    except Exception as error:  # of a file that is no checkpoint, the unpickler makes any error at all
        raise CheckpointError(f"{file}: damaged, or not a torch file ({type(error).__name__})") from error
    return _unwrap(saved, file)


def _unwrap(saved: object, file: Path) -> tuple[State, dict[str, Any] | None]:
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file}: holds a {type(saved).__name__}, not a state dict")
    wrapper = next((key for key in ("model", "model_state_dict") if isinstance(saved.get(key), dict)), None)
    state = saved if wrapper is None else saved[wrapper]
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()):
        raise CheckpointError(f"{file}: holds no state dict, neither by itself nor under 'model' or 'model_state_dict'")
    values = None if wrapper is None else saved.get("config")
    if not isinstance(values, dict | None):
        raise CheckpointError(f"{file}: its config is a {type(values).__name__}, not a dict")
    return state, values


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: should be an object, is a {type(values).__name__}")
    return values


def _infer_config(state: State, layers: int | None, file: Path) -> BDHConfig:
    encoder, embed = state.get("encoder"), state.get("embed.weight")
    if encoder is None or embed is None or encoder.ndim != 3 or embed.ndim != 2:
        raise CheckpointError(
            f"{file}: no {CONFIG} beside it, and without encoder [heads, D, N] and embed.weight [V, D] none can be "
            f"inferred; found {_listing(state)}"
        )
    if layers is None:
        log.warning("%s does not tell its number of layers: taking upstream's %d (model.layers)", file, UPSTREAM_LAYERS)
    heads, width, neurons = encoder.shape
    return BDHConfig(
        n_layer=layers or UPSTREAM_LAYERS,
        n_embd=width,
        n_head=heads,
        mlp_internal_dim_multiplier=heads * neurons // width,
        vocab_size=embed.shape[0],
    )


def _check(state: State, config: BDHConfig, file: Path) -> None:
    expected = config.shapes()
    problems = [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in state]
    problems += [f"extra {key}" for key in sorted(state.keys() - expected.keys() - SPARE_KEYS)]
    problems += [
        f"{key} has shape {list(state[key].shape)}, not {list(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    problems += [
        f"{key} holds {state[key].dtype}, not floats"
        for key in expected
        if key in state and not state[key].is_floating_point()
    ]
    freqs = state.get(FREQUENCIES)
    if freqs is not None and freqs.numel() != config.neurons_per_head:
        problems.append(f"{FREQUENCIES} has {freqs.numel()} elements, not {config.neurons_per_head}")
    if problems:
        raise CheckpointError(f"{file}: " + "; ".join(problems))


def _weights(state: State, config: BDHConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    def place(key: str) -> Tensor:
        return state[key].to(device=device, dtype=dtype).contiguous()

    freqs = state.get(FREQUENCIES)
    if freqs is None or freqs.dtype != torch.float32:  # a narrower one has lost the phases
        freqs = rope_frequencies(config.neurons_per_head)
    return Weights(
        layers=config.n_layer,
        embed=place("embed.weight"),
        encoder=place("encoder"),
        encoder_v=place("encoder_v"),
        decoder=place("decoder"),
        lm_head=place("lm_head"),
        frequencies=freqs.flatten().to(device),
    )


def _listing(state: State) -> str:
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(state.items())) or "nothing"
