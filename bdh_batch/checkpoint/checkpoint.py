"""Checkpoints to weights: every file that `files` reads and `dialects` understands, checked; and the native folder.

A native folder holds `config.json` (upstream's `BDHConfig` fields, perhaps `trained_context`), `model.safetensors`,
`tokenizer_config.json`, `generation_config.json` and perhaps `chat_template.jinja`; the last three are not read here.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bdh_batch.checkpoint import int8
from bdh_batch.checkpoint.checks import check, check_open, dtype_name, frequencies_agree, settled, sizes_of
from bdh_batch.checkpoint.config import MATRICES, NOTHING, BDHConfig, Given
from bdh_batch.checkpoint.dialects.fields import read_fields
from bdh_batch.checkpoint.dialects.keys import EMBED, FREQUENCIES, HEAD, LATENT
from bdh_batch.checkpoint.dialects.kinds import arrange, read_tensors
from bdh_batch.checkpoint.files import CONFIG, WEIGHTS, ObjectFields, State, read_source
from bdh_batch.errors import CheckpointError
from bdh_batch.kernels.base import Scales, Weights
from bdh_batch.system.device_memory import free_memory
from bdh_batch.system.documents import listed

log = logging.getLogger(__name__)

UPSTREAM_LAYERS = BDHConfig().n_layer


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: its config, and its weights in memory.

    `neuron_order` [N]: for each neuron of a head as `weights` number them, its number in the checkpoint; None where
    they are the same. `kind` is that of the file.
    """

    config: BDHConfig
    weights: Weights
    neuron_order: Tensor | None = None
    kind: str = "upstream"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds, in upstream's names: the right tensors in the right shapes, perhaps not yet read.

    `layers_known` is False where neither the file nor the caller gave the number of layers, and upstream's was taken.
    """

    file: Path
    config: BDHConfig
    state: State
    layers_known: bool
    kind: str

    def tensor_keys(self) -> list[str]:
        """Of all that is in `state` and part of the model, but for RoPE's frequencies."""
        keys = self.config.shapes()
        return [*keys, *int8.scale_keys(self.state, keys), *({LATENT} & self.state.keys())]

    def read(self, key: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A matrix or the head to be copied to `dtype`; and as int8, its scales.

        Raises:
            CheckpointError: it has scales below 0.
        """
        tensor, scales = self.state[key], self.state.get(int8.scales_key(key))
        if scales is not None and (scales < 0).any():
            raise CheckpointError(f"{self.file}: {int8.scales_key(key)} has numbers below 0")
        if dtype != torch.int8:
            return (tensor if scales is None else int8.widen(tensor, scales, int8.across(key))), None
        return int8.quantize(tensor, int8.across(key)) if scales is None else (tensor, scales)

    def frequencies(self) -> Tensor:
        """RoPE's [N], float32, in the file's order. What was saved narrower has lost the phases: then they are computed
        anew."""
        saved = self.state.get(FREQUENCIES)
        if saved is None or saved.dtype.itemsize < torch.float32.itemsize:
            return self.config.frequencies()
        return saved.flatten().float()

    def description(self) -> dict[str, Any]:
        """The config's fields, with what a reader of them would otherwise have to assume."""
        return described(self.config, self.frequencies())

    def variant(self) -> str:
        """In words, what distinguishes the model from others of its sizes."""
        base = f"{self.config.rope_theta:,g}" if frequencies_agree(self.frequencies(), self.config) else "of its own"
        return self.config.variant(base)

    def check_finite(self) -> None:
        """Reads all weights.

        Raises:
            CheckpointError: some are NaN or infinite; the message counts them.
        """
        _check_finite({key: self.state[key] for key in self.tensor_keys()}, self.file)


def fingerprint(weights: Weights) -> str:
    """Returns a hash of all that is in `weights`, as they are in memory."""
    digest = blake2b(digest_size=16)
    tensors = dict(_tensors(weights))
    for name in (field.name for field in fields(Weights) if field.name != "scales"):
        if name not in tensors:
            digest.update(f"{name} {getattr(weights, name)}".encode())
        else:
            _add(digest, name, tensors.pop(name))
    for name, tensor in tensors.items():
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: blake2b, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """All that `weights` hold, by name; scales by that of what they are of."""
    for name in (field.name for field in fields(Weights)):
        if isinstance(tensor := getattr(weights, name), Tensor):
            yield name, tensor
    for name in (field.name for field in fields(Scales)) if weights.scales is not None else ():
        yield f"{name}_scales", getattr(weights.scales, name)


def load_model(path: Path, dtype: torch.dtype, device: torch.device, given: Given = NOTHING) -> Model:
    """Reads a model folder, a `.pt` or a `.safetensors` file.

    Args:
        path: the folder or the file; a `config.json` beside a file goes before the config inside it.
        dtype: of the weights in memory; RoPE's frequencies stay float32, and beside int8 the embedding.
        given: what the file may leave open.

    Raises:
        CheckpointError: nothing there, unreadable, or with missing, extra or misshapen keys, every one of them listed.
    """
    checkpoint = open_checkpoint(path, given)
    if not checkpoint.layers_known:
        name = checkpoint.file
        log.warning("%s does not say its number of layers: taking upstream's %d (model.layers)", name, UPSTREAM_LAYERS)
    _check_memory(checkpoint, dtype, device)
    log.info("%s: %s; %s", checkpoint.file, checkpoint.kind, checkpoint.variant())
    if dtype != torch.int8 and int8.scale_keys(checkpoint.state, checkpoint.config.shapes()):
        log.info("its weights are int8, and are widened: model.dtype=int8 serves them as they are")
    weights = _weights(checkpoint, dtype, device)
    return Model(checkpoint.config, weights, checkpoint.config.neuron_order(), checkpoint.kind)


def _weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Weights:
    """Copies always: what is only mapped would change with the file."""
    config, order = checkpoint.config, checkpoint.config.neuron_order()

    def copy(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return tensor.to(device=device, dtype=dtype, copy=True).contiguous()

    read = {name: _matrices(checkpoint, name, dtype, device) for name in MATRICES}
    head, head_scales = checkpoint.read(HEAD, dtype)
    tensors = {name: sets for name, (sets, _) in read.items()} | {"lm_head": copy(head, dtype)}
    found = {name: scales for name, (_, scales) in read.items() if scales is not None}
    scales = None if head_scales is None else Scales(**found, lm_head=copy(head_scales))
    embed = copy(checkpoint.state[EMBED], torch.float32 if dtype == torch.int8 else dtype)
    frequencies = checkpoint.frequencies()
    latent = checkpoint.state.get(LATENT)
    weights = Weights(
        layers=config.n_layer,
        embed=embed,
        **tensors,
        frequencies=copy(frequencies if order is None else frequencies[order]),
        final_norm=config.norm == "final",
        latent_embed=None if latent is None else copy(latent),
        scales=scales,
    )
    names = {"embed": EMBED, "lm_head": HEAD, "latent_embed": LATENT}
    _check_finite({names.get(name, name): tensor for name, tensor in _tensors(weights)}, checkpoint.file)
    return weights


def _matrices(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The matrices of all sets [M, …], their neurons in the kernels' order; and of int8, their scales."""
    config = checkpoint.config
    keys = config.matrix_keys(name)
    shape = config.shapes()[keys[0]]
    sets = torch.empty(len(keys), *shape, dtype=dtype, device=device)
    scales = torch.empty(len(keys), *int8.scales_shape(name, shape), device=device) if dtype == torch.int8 else None
    for at, key in enumerate(keys):
        matrix, of_matrix = checkpoint.read(key, dtype)
        sets[at].copy_(_ordered(matrix, name, config))
        if scales is not None and of_matrix is not None:
            scales[at].copy_(_ordered(of_matrix, name, config))
    return sets, scales


def _ordered(tensor: Tensor, name: str, config: BDHConfig) -> Tensor:
    """A matrix, or its scales, with neurons in the kernels' order."""
    order = config.neuron_order()
    if order is None:
        return tensor
    if name == "decoder":
        return tensor.view(config.n_head, -1, *tensor.shape[1:])[:, order].flatten(0, 1)
    return tensor[..., order]


def open_checkpoint(path: Path, given: Given = NOTHING) -> Checkpoint:
    """As `load_model`, but leaves the tensors where and as they are; NaN is not looked for."""
    source = read_source(path)
    with _blaming(source.config_file):
        fields = read_fields(source.values or {})
    with _blaming(source.file):
        tensors = read_tensors(source.state, fields)
        sizes = sizes_of(tensors, fields, needed=source.values is None)
    with _blaming(source.config_file):
        BDHConfig.from_dict(sizes | fields.values)  # what is wrong by itself is reported before what contradicts
        known = settled(fields.values, tensors, given)
        config = _config(sizes | known, given)
        if isinstance(source.values, ObjectFields) and "n_layer" not in known:
            text = "its config is a pickled object without n_layer, which its class may have said; give model.layers"
            raise CheckpointError(text)
    with _blaming(source.file):
        check_open(tensors, known)
        arrange(tensors, config)
        check(tensors, config, fields, known)
    return Checkpoint(source.file, config, tensors.state, "n_layer" in known, tensors.kind.name)


def _config(values: Mapping[str, Any], given: Given) -> BDHConfig:
    """Errors name the options that the values are partly of."""
    try:
        return BDHConfig.from_dict(values)
    except CheckpointError as error:
        options = ", ".join(option for option, _ in given.fields().values())
        raise CheckpointError(f"{error} (with {options})" if options else error.message) from error


def described(config: BDHConfig, frequencies: Tensor) -> dict[str, Any]:
    """What `config.json` should say of a model with these frequencies, so that nothing has to be assumed."""
    base = {"rope_theta": config.rope_theta} if frequencies_agree(frequencies, config) else {}
    return config.to_dict() | {"norm": config.norm, "rope_layout": config.rope_layout} | base


def save_model(folder: Path, config: BDHConfig, state: Mapping[str, Tensor], generation: Mapping[str, Any]) -> None:
    """Writes the native folder of a byte-level model; `generation` holds the sampling defaults it suggests.

    Where `state` has no frequencies of RoPE, they are the config's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {FREQUENCIES: config.frequencies().view(1, 1, 1, -1)} | dict(state)
    optional = [LATENT] if LATENT in tensors else []
    saved = {key: tensors[key].detach().contiguous() for key in (*config.shapes(), FREQUENCIES, *optional)}
    (folder / WEIGHTS).write_bytes(save(saved))
    for name, values in (
        (CONFIG, described(config, tensors[FREQUENCIES].flatten().float())),
        ("tokenizer_config.json", {"type": "byte"}),
        ("generation_config.json", dict(generation)),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _check_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    size = int8.bytes_of_weights(checkpoint.config, dtype)
    if size > (free := free_memory(device)):
        text = (
            f"its weights take {size:,} bytes in {dtype_name(dtype)} (model.dtype), and {free:,} are free on {device}"
        )
        raise CheckpointError(f"{checkpoint.file}: {text}")


@contextlib.contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Errors inside begin with the file that is at fault."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_finite(state: Mapping[str, Tensor], file: Path) -> None:
    bad = {key: int(tensor.numel() - tensor.isfinite().sum()) for key, tensor in state.items()}
    problems = [
        f"{key} has {count} numbers of {state[key].numel()} that are NaN or infinite in {dtype_name(state[key].dtype)}"
        for key, count in bad.items()
        if count
    ]
    if problems:
        raise CheckpointError(f"{file}: " + listed(problems))
