"""Any checkpoint to a native folder that holds the same model, bit by bit, or the same with weights of int8."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bdh_batch.checkpoint import int8
from bdh_batch.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bdh_batch.checkpoint.config import NOTHING, Given
from bdh_batch.checkpoint.dialects.keys import EMBED, FREQUENCIES, LATENT
from bdh_batch.checkpoint.files import CONFIG, WEIGHTS
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import listed, of_tokenizer, shown

BYTES = 256  # a vocabulary of so many tokens is bytes, unless a tokenizer is there
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
BESIDE = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", GENERATION_CONFIG),
)  # copied as they are
OWN = {CONFIG, WEIGHTS, *BESIDE}


def convert(
    source: Path, target: Path, given: Given = NOTHING, force: bool = False, quantized: bool = False
) -> Checkpoint:
    """Writes the model at `source` as the native folder `target`, whole or not at all; the checkpoint that was read.

    Weights keep their dtype; RoPE's frequencies are written as they are served. The tokenizer, the chat template and
    the sampling defaults that lie beside the weights come along.

    Args:
        given: what the source may leave open.
        force: may replace a model folder, which nothing else may lie in.
        quantized: writes the matrices and the head as int8 with their scales.

    Raises:
        CheckpointError: the source cannot be loaded, or the target cannot be written.
    """
    target = Path(os.path.abspath(target))  # "." has no name, and no parent
    checkpoint = open_checkpoint(source, given)
    if not checkpoint.layers_known:
        raise CheckpointError(f"{checkpoint.file}: does not say its number of layers; give it with --layers")
    checkpoint.check_finite()
    folder = checkpoint.file.parent
    try:
        _check_target(checkpoint.file, target, force)
        beside = {name: inside(folder, name) for name in BESIDE if os.path.lexists(of_tokenizer(folder, name))}
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            _write(new, checkpoint, quantized_tensors(checkpoint) if quantized else plain_tensors(checkpoint), beside)
            _put(new, target, Path(scratch) / "old")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: cannot be written ({shown(error)})") from error
    return checkpoint


def _check_target(file: Path, target: Path, force: bool) -> None:
    if target.is_symlink():
        raise CheckpointError(f"{target}: is a link; name the folder that is to be written")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; a model is written as a folder")
    if target.is_dir() and file.parent.samefile(target):
        raise CheckpointError(f"{target}: is where the source lies; choose another folder")
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if there and not force:
        raise CheckpointError(f"{target}: is not empty; --force replaces it, choose another otherwise")
    if strangers := sorted(there - OWN):
        raise CheckpointError(
            f"{target}: holds {listed(map(shown, strangers), ', ')} besides a model, which --force does not delete"
        )


def plain_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a native folder, but for RoPE's frequencies, as they are in the checkpoint."""
    return {key: checkpoint.state[key] for key in checkpoint.tensor_keys()}


def quantized_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The same with int8 matrices and head, and their scales."""
    tensors = {key: checkpoint.state[key] for key in ({EMBED, LATENT} & checkpoint.state.keys())}
    for key in filter(int8.is_quantized, checkpoint.config.shapes()):
        tensors[key], scales = checkpoint.read(key, torch.int8)
        if scales is not None:
            tensors[int8.scales_key(key)] = scales
    return tensors


def _write(folder: Path, checkpoint: Checkpoint, found: Mapping[str, Tensor], beside: Mapping[str, Path]) -> None:
    config = checkpoint.config
    (folder / CONFIG).write_text(json.dumps(checkpoint.description(), indent=2) + "\n", "utf-8")
    # Clones, as a safetensors file cannot hold two tensors that share memory.
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in found.items()}
    tensors[FREQUENCIES] = checkpoint.frequencies().view(1, 1, 1, -1).clone()
    save_file(tensors, folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # save_file leaves it to its owner alone
    for name, file in beside.items():
        shutil.copyfile(file, folder / name)
    if not (folder / GENERATION_CONFIG).exists():
        (folder / GENERATION_CONFIG).write_text("{}\n", "utf-8")
    if config.vocab_size == BYTES and not any((folder / name).exists() for name in (TOKENIZER, TOKENIZER_CONFIG)):
        (folder / TOKENIZER_CONFIG).write_text(json.dumps({"type": "byte"}, indent=2) + "\n", "utf-8")


def inside(source: Path, name: str) -> Path:
    """The file that `name` is: a link could lead to one that its author cannot read, and we can.

    Raises:
        CheckpointError: it is not a regular file in `source`, or where Hugging Face's cache keeps a snapshot's files.
    """
    path, home = of_tokenizer(source, name), source.resolve()
    file, homes = path.resolve(), [home]
    if path.parent.resolve().is_relative_to(home):
        homes.append(path.parent.resolve())
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
    if file.parent not in homes or not file.is_file():
        raise CheckpointError(f"{path}: leads to {shown(file)}, which is not a regular file in its folder")
    return file


def _put(folder: Path, target: Path, old: Path) -> None:
    """Makes `folder` the target; what was there goes to `old`, and comes back if that fails."""
    if not target.is_dir():
        os.rename(folder, target)
        return
    os.rename(target, old)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(old, target)
        raise
