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

from bdh_batch.checkpoint.checks import check, check_open, dtype_name, frequencies_agree, settled, sizes_of
from bdh_batch.checkpoint.config import MATRICES, NOTHING, BDHConfig, Given
from bdh_batch.checkpoint.dialects.fields import read_fields
from bdh_batch.checkpoint.dialects.keys import EMBED, FREQUENCIES, HEAD, LATENT
from bdh_batch.checkpoint.dialects.kinds import arrange, read_tensors
from bdh_batch.checkpoint.files import CONFIG, WEIGHTS, ObjectFields, State, read_source
from bdh_batch.errors import CheckpointError
from bdh_batch.kernels.base import Weights
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
        keys = (*self.config.shapes(), *({LATENT} & self.state.keys()))
        _check_finite({key: self.state[key] for key in keys}, self.file)


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


def load_model(path: Path, dtype: torch.dtype, device: torch.device, given: Given = NOTHING) -> Model:
    """Reads a model folder, a `.pt` or a `.safetensors` file.

    Args:
        path: the folder or the file; a `config.json` beside a file goes before the config inside it.
        dtype: of the weights in memory; RoPE's frequencies stay float32.
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
    weights = _weights(checkpoint, dtype, device)
    return Model(checkpoint.config, weights, checkpoint.config.neuron_order(), checkpoint.kind)


def _weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Weights:
    """Copies always: what is only mapped would change with the file."""
    config, order = checkpoint.config, checkpoint.config.neuron_order()

    def copy(tensor: Tensor, dtype: torch.dtype = dtype) -> Tensor:
        return tensor.to(device=device, dtype=dtype, copy=True).contiguous()

    def stack(name: str) -> Tensor:
        """The matrices of all sets [M, …], their neurons in the kernels' order."""
        keys = config.matrix_keys(name)
        sets = torch.empty(len(keys), *config.shapes()[keys[0]], dtype=dtype, device=device)
        for matrix, key in zip(sets, keys):
            source = checkpoint.state[key]
            if order is not None and name == "decoder":
                source = source.reshape(config.n_head, -1, config.n_embd)[:, order].flatten(0, 1)
            elif order is not None:
                source = source[..., order]
            matrix.copy_(source)
        return sets

    matrices = {name: stack(name) for name in MATRICES}
    embed, head = copy(checkpoint.state[EMBED]), copy(checkpoint.state[HEAD])
    frequencies = checkpoint.frequencies()
    latent = checkpoint.state.get(LATENT)
    _check_finite(
        {EMBED: embed, **matrices, HEAD: head} | ({} if latent is None else {LATENT: latent}), checkpoint.file
    )
    return Weights(
        layers=config.n_layer,
        embed=embed,
        **matrices,
        lm_head=head,
        frequencies=copy(frequencies if order is None else frequencies[order], torch.float32),
        final_norm=config.norm == "final",
        latent_embed=None if latent is None else copy(latent, torch.float32),
    )


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
    size = sum(checkpoint.state[key].numel() for key in checkpoint.config.shapes()) * dtype.itemsize
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
