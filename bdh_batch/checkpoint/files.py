"""Model files to tensors by name, as they are in the file. Knows nothing about what the tensors are.

Files come from strangers: nothing in them is run, nothing outside their folder is read, and whatever is wrong with one
is a `CheckpointError`. Tensors are mapped, not read, where the format allows it: looking at a model costs no memory.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bdh_batch.checkpoint import npz
from bdh_batch.checkpoint.pickles import PlainObject, check_torch_file, is_zip, refuse_pickled, stand_in
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import listed, read_json, shown

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUGGING_FACE_NAMES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
FILE_SUFFIXES = (*TORCH_SUFFIXES, npz.SUFFIX)  # of what a folder may hold its weights in, whatever it is called
BURN_SUFFIXES = (".bpk", ".burnpack", ".mpk")
BURNPACK = b"NRUB"  # what a Burnpack begins with
WRAPPERS = ("model", "model_state_dict", "state_dict", "model_state")  # where trainers put the state dict
STRANGE_WRAPPER = "bdh_state_dict"
E_DX_DY = (
    f"is a model of the matrices E, Dx and Dy ({STRANGE_WRAPPER}), another architecture, which is not computed here"
)
MOST_CLASSES = 8  # that a config may be made of
CONFIG_KEYS = ("model_args", "model_config", "config")  # and what it needs; the plain one may be of the whole training
LARGEST_HEADER = 4 * 2**20  # bytes of a safetensors file: some 50,000 tensors
PLAIN_NAME = re.compile(r"\w[\w.-]*")

State = dict[str, Tensor]


class ObjectFields(dict[str, Any]):
    """The fields of an object that was pickled. Its class, which is not there, may have had others for it."""


@dataclass(frozen=True, slots=True)
class Source:
    """What was found: the tensors, and the config beside them or in their file, None where there is neither."""

    file: Path
    state: State
    values: dict[str, Any] | None
    config_file: Path  # the file that `values` came from


def read_source(path: Path) -> Source:
    """Reads a model folder, a `.pt`, `.bin` or `.npz` file, a `.safetensors` file or the index of several.

    Raises:
        CheckpointError: nothing there, or unreadable; the message names the file.
    """
    try:
        file = _locate(path)
        state, values = _read_index(file) if file.suffix == ".json" else _read(file)
        beside = file.parent / CONFIG
        if beside.is_file():
            return Source(file, state, read_json(beside), beside)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return Source(file, state, values, file)


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"model.path: there is no model at {path}")
    return path / weights_among({file.name for file in path.iterdir() if file.is_file()}, f"model.path: {path}")


def weights_among(names: Collection[str], folder: str) -> str:
    """The file that a model's weights are in, or that lists where they are, of those in a folder.

    Args:
        folder: what errors call it.

    Raises:
        CheckpointError: there is none, or it is not clear which.
    """
    found = [name for name in HUGGING_FACE_NAMES if name in names][:1]
    found = found or sorted(name for name in names if Path(name).suffix in FILE_SUFFIXES)
    if not found and (burn := sorted(name for name in names if Path(name).suffix in BURN_SUFFIXES)):
        raise CheckpointError(f"{folder}: {_burnpack(burn[0])}")
    if len(found) != 1:
        there = ", ".join(map(shown, found)) or "neither"
        raise CheckpointError(f"{folder} should hold {WEIGHTS} or one .pt or .npz file; found {there}")
    if found[0].startswith(WEIGHTS) and CONFIG not in names:
        raise CheckpointError(f"{folder} has no {CONFIG}")
    return found[0]


def _read(file: Path) -> tuple[State, dict[str, Any] | None]:
    """The tensors, and the config that a trainer put beside them."""
    with file.open("rb") as stream:
        if file.suffix in BURN_SUFFIXES or stream.read(len(BURNPACK)) == BURNPACK:
            raise CheckpointError(f"{file}: {_burnpack(file.name)}")
    if file.suffix == npz.SUFFIX:
        return npz.read_npz(file), None
    if file.suffix != ".safetensors":
        return _unwrap(_load_pickle(file), file)
    _check_header(file)
    try:
        return load_file(file), None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged, or not a safetensors file ({shown(error)})") from error


def _burnpack(name: str) -> str:
    return f"{shown(name)} is a Burnpack, of models in Rust, which is not read; export it as safetensors"


def _check_header(file: Path) -> None:
    """The library takes seconds for a hundred thousand names, and a header may have a hundred megabytes of them."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    if size > LARGEST_HEADER:
        text = f"its header claims {size:,} bytes; a BDH's has a few hundred, and {LARGEST_HEADER:,} are read at most"
        raise CheckpointError(f"{file}: damaged, or not a BDH ({text})")


def _read_index(file: Path) -> tuple[State, None]:
    """The tensors of several files, which must be those that Hugging Face's index `file` lists."""
    part_names = weight_map(file)
    state: State = {}
    problems = []
    for name in sorted(set(part_names.values())):
        part = file.parent / name
        if not PLAIN_NAME.fullmatch(name):  # a path could lead anywhere
            problems.append(f"{name!r} is not the name of a file in its folder")
        elif not part.is_file():
            problems.append(f"{name} is missing")
        else:
            tensors, _ = _read(part)
            listed_keys = {key for key, part_name in part_names.items() if part_name == name}
            problems += [f"{name} lacks {shown(key)}" for key in sorted(listed_keys - tensors.keys())]
            unlisted = sorted(tensors.keys() - listed_keys)
            problems += [f"{name} holds {shown(key)}, not listed in the index" for key in unlisted]
            state |= tensors
    if problems:
        raise CheckpointError(f"{file}: " + listed(problems))
    return state, None


def weight_map(index: Path) -> dict[str, str]:
    """The name of the file of each tensor, as Hugging Face's index has them: they may be anything at all."""
    part_names = read_json(index).get("weight_map")
    if not isinstance(part_names, dict) or not all(isinstance(name, str) for name in part_names.values()):
        raise CheckpointError(f"{index}: its weight_map should name the file of each tensor")
    return part_names


def _load_pickle(file: Path) -> object:
    """What `torch.save` wrote. Objects in it are replaced by their fields, where they are a config of plain fields.

    Their classes are not imported, and nothing of them is run: a stand-in takes what the file has of them.
    """
    check_torch_file(file)
    made: list[PlainObject] = []
    classes: dict[str, type[PlainObject]] = {}
    while True:
        made.clear()
        try:
            with torch.serialization.safe_globals([(each, name) for name, each in classes.items()]):
                saved = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip(file))
            break
        except pickle.UnpicklingError as error:
            if not (strange := re.search(r"GLOBAL (\S+)", str(error))):
                if classes:  # objects that are more than their fields, such as dicts of a kind of their own
                    raise refuse_pickled(file, next(iter(classes))) from error
                raise CheckpointError(f"{file}: damaged, or not a torch file") from error
            if strange[1] in classes or len(classes) == MOST_CLASSES or not re.fullmatch(r"[\w.]+", strange[1]):
                raise refuse_pickled(file, strange[1]) from error
            classes[strange[1]] = stand_in(file, strange[1], made)
        except CheckpointError:
            raise
        except Exception as error:  # of a file that is no checkpoint, the unpickler makes any error at all
            raise CheckpointError(f"{file}: damaged, or not a torch file ({type(error).__name__})") from error
    return _plain(saved, made, classes, file)


def _plain(saved: object, made: list[PlainObject], classes: Mapping[str, object], file: Path) -> object:
    """`saved` with dicts for the objects that are its config; there may be no others."""
    configs = [saved[key] for key in CONFIG_KEYS if key in saved] if isinstance(saved, dict) else []
    for each in made:
        if not vars(each) or not any(each is config for config in configs):
            raise refuse_pickled(file, type(each).name)
    if classes and not made:  # named, and not made: a class or a function itself
        raise refuse_pickled(file, next(iter(classes)))
    if not isinstance(saved, dict):
        return saved
    return {key: ObjectFields(vars(value)) if isinstance(value, PlainObject) else value for key, value in saved.items()}


def _unwrap(saved: object, file: Path) -> tuple[State, dict[str, Any] | None]:
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file}: holds a {type(saved).__name__}, not a state dict")
    if STRANGE_WRAPPER in saved:
        raise CheckpointError(f"{file}: {E_DX_DY}")
    wrapper = next((key for key in WRAPPERS if isinstance(saved.get(key), dict)), None)
    state = saved if wrapper is None else saved[wrapper]
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()):
        raise CheckpointError(
            f"{file}: holds no state dict, neither by itself nor under one of {', '.join(map(repr, WRAPPERS))}"
        )
    _check_backed(state, file)
    values = None if wrapper is None else next((saved[key] for key in CONFIG_KEYS if saved.get(key) is not None), None)
    if not isinstance(values, dict | None):
        raise CheckpointError(f"{file}: its config is a {type(values).__name__}, not a dict")
    return {key: tensor.detach() for key, tensor in state.items()}, values


def _check_backed(state: Mapping[str, Tensor], file: Path) -> None:
    """A pickle can claim tensors far larger than itself, which would take that memory once they are used."""
    problems = [
        f"{shown(key)} is not a plain tensor whose numbers are in the file"
        for key, tensor in state.items()
        if tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
    ]
    if problems:
        raise CheckpointError(f"{file}: " + listed(problems))
