"""The checkpoints that people have: one function for each way to save the same model."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bdh_batch.checkpoint.checkpoint import save_model
from bdh_batch.checkpoint.config import BDHConfig, rope_frequencies
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import TorchKernels

CPU = torch.device("cpu")
State = dict[str, Tensor]
Writer = Callable[[Path, BDHConfig, State], Path]  # folder, config, upstream's state dict; the path to load
UNLAYERED = ("embed.weight", "lm_head", "attn.freqs")


def random_state(config: BDHConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in config.shapes().items()}


def logits(weights: Weights, config: BDHConfig, tokens: int = 9) -> Tensor:
    """What the specification computes for one sequence."""
    kernels, pool = TorchKernels(weights), StatePool(config, 1, CPU)
    pool.clear(0)
    ids = torch.arange(tokens) * 5 % config.vocab_size
    hidden = kernels.forward(pool.states, RaggedBatch(ids, torch.arange(tokens), (0, tokens), (0,)))
    return kernels.logits(hidden)


def expected_weights(config: BDHConfig, state: State) -> Weights:
    values: dict[str, Any] = {key.removesuffix(".weight"): tensor.float() for key, tensor in state.items()}
    values |= {key: values[key][None] for key in ("encoder", "encoder_v", "decoder")}
    return Weights(layers=config.n_layer, frequencies=rope_frequencies(config.neurons_per_head), **values)


def with_freqs(config: BDHConfig, state: State) -> State:
    return OrderedDict(state | {"attn.freqs": rope_frequencies(config.neurons_per_head).view(1, 1, 1, -1)})


def upstream_config(config: BDHConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "trained_context"}


def save(folder: Path, saved: object, **options: Any) -> Path:
    torch.save(saved, folder / "model.pt", **options)
    return folder / "model.pt"


def native(folder: Path, config: BDHConfig, state: State) -> Path:
    save_model(folder, config, state, {})
    return folder


def bare(folder: Path, config: BDHConfig, state: State) -> Path:
    (folder / "config.json").write_text(json.dumps(upstream_config(config)))
    return save(folder, with_freqs(config, state)).parent


def legacy(folder: Path, config: BDHConfig, state: State) -> Path:
    """As torch saved before 1.6, an older upstream, and parameters instead of tensors."""
    parameters = {key: nn.Parameter(tensor) for key, tensor in with_freqs(config, state).items()}
    wrapped = {"model": parameters | {"lm_gate": torch.zeros(3, 1)}, "config": upstream_config(config)}
    return save(folder, wrapped, _use_new_zipfile_serialization=False)


def trainer(folder: Path, config: BDHConfig, state: State) -> Path:
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in with_freqs(config, state).items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    values = upstream_config(config) | {"block_size": 128, "device": "cuda"}
    return save(folder, {"model": compiled, "optimizer": optimizer, "step": 7, "config": values})


def distributed(folder: Path, config: BDHConfig, state: State) -> Path:
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in with_freqs(config, state).items()}
    return save(folder, {"model_state_dict": wrapped, "model_args": upstream_config(config), "config": {"lr": 1e-3}})


def lightning(folder: Path, config: BDHConfig, state: State) -> Path:
    """A module that holds the model as `self.model`."""
    (folder / "config.json").write_text(json.dumps(upstream_config(config)))
    wrapped = {f"model.{key}": tensor for key, tensor in with_freqs(config, state).items()}
    return save(folder, {"state_dict": wrapped, "epoch": 3, "pytorch-lightning_version": "2.5.0", "callbacks": {}})


def attention_by_layer(folder: Path, config: BDHConfig, state: State) -> Path:
    """States its number of layers, and needs no config."""
    freqs = rope_frequencies(config.neurons_per_head)
    return save(folder, {"model": state | {f"attns.{i}.freqs": freqs.clone() for i in range(config.n_layer)}})


def shared_by_layer(folder: Path, config: BDHConfig, state: State) -> Path:
    layered = {f"{key}.{i}": state[key] for key in ("encoder", "encoder_v", "decoder") for i in range(config.n_layer)}
    return save(folder, layered | {key: with_freqs(config, state)[key] for key in UNLAYERED})


def modules_by_layer(folder: Path, config: BDHConfig, state: State) -> Path:
    keys = ("encoder", "encoder_v", "decoder")
    layered = {f"layers.{i}.{key}": state[key].clone() for key in keys for i in range(config.n_layer)}
    return save(folder, layered | {key: with_freqs(config, state)[key] for key in UNLAYERED})


def model_state(folder: Path, config: BDHConfig, state: State) -> Path:
    """A model that holds the BDH as its core; frequencies are the model's own."""
    wrapped = {f"core.{key}": tensor for key, tensor in state.items()}
    freqs = rope_frequencies(config.neurons_per_head)
    return save(folder, {"model_state": wrapped | {"freqs": freqs}, "config": upstream_config(config)})


@dataclass
class TrainerConfig:
    n_layer: int
    n_embd: int
    n_head: int
    mlp_internal_dim_multiplier: int
    vocab_size: int
    dropout: float = 0.1


def pickled_config(folder: Path, config: BDHConfig, state: State) -> Path:
    """The config as an object, which a server that does not have its class can only read the fields of."""
    return save(folder, {"model": with_freqs(config, state), "config": TrainerConfig(**upstream_config(config))})


def mlx(folder: Path, config: BDHConfig, state: State) -> Path:
    """Arrays of one list, bfloat16 as MLX writes it."""
    names = {"embed.weight": "embed_weight", "attn.freqs": "attn_freqs"}
    arrays: dict[str, Any] = {
        names.get(key, key): tensor.view(torch.int16).numpy().view("V2")
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
        for key, tensor in with_freqs(config, state).items()
    }
    np.savez(folder / "model.npz", step=np.array(700), loss=np.array(1.25), **arrays)
    (folder / "config.json").write_text(json.dumps(upstream_config(config)))
    return folder / "model.npz"


def hugging_face(config: BDHConfig, state: State, **more: Any) -> tuple[dict[str, Any], State]:
    values = {
        **{"architectures": ["BDHForCausalLM"], "bos_token_id": 0, "model_type": "bdh", "use_cache": True},
        **{"num_hidden_layers": config.n_layer, "hidden_size": config.n_embd, "num_attention_heads": config.n_head},
        **{"mlp_internal_dim_multiplier": config.mlp_internal_dim_multiplier, "vocab_size": config.vocab_size},
        **{"sliding_window": None, "torch_dtype": "float32", "transformers_version": "4.57.1"},
    }
    renamed = {f"backbone.{key}": tensor for key, tensor in state.items() if key != "lm_head"}
    return values | more, renamed | {"lm_head.weight": state["lm_head"].mT.contiguous()}


def hf_folder(folder: Path, config: BDHConfig, state: State) -> Path:
    values, tensors = hugging_face(config, state, tie_word_embeddings=False)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def hf_pickle(folder: Path, config: BDHConfig, state: State) -> Path:
    values, tensors = hugging_face(config, state)
    (folder / "config.json").write_text(json.dumps(values))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def hf_shards(folder: Path, config: BDHConfig, state: State, name: str = "model.safetensors") -> Path:
    values, tensors = hugging_face(config, state)
    (folder / "config.json").write_text(json.dumps(values))
    part_names: dict[str, str] = {}
    for number, part in enumerate((sorted(tensors)[:2], sorted(tensors)[2:]), 1):
        stem, _, suffix = name.rpartition(".")
        shard = f"{stem}-{number:05}-of-00002.{suffix}"
        content = {key: tensors[key] for key in part}
        (save_file if suffix == "safetensors" else torch.save)(content, folder / shard)
        part_names |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": part_names}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return folder


def hf_pickle_shards(folder: Path, config: BDHConfig, state: State) -> Path:
    return hf_shards(folder, config, state, "pytorch_model.bin")


ALL: tuple[Writer, ...] = (
    *(native, bare, legacy, trainer, lightning, distributed, attention_by_layer, shared_by_layer, modules_by_layer),
    *(hf_folder, hf_pickle, hf_shards, hf_pickle_shards),
    *(model_state, pickled_config, mlx),
)
