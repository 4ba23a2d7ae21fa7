"""The keys of a state dict, without what stands around them: what wraps the model, and the numbers of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdh_batch.checkpoint.config import MATRICES, SCALES
from bdh_batch.checkpoint.files import State
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import listed, shown

EMBED, HEAD, FREQUENCIES, LATENT = "embed.weight", "lm_head", "attn.freqs", "latent_step_embed"
RADIANS = "rope.freqs"  # RoPE's frequencies in radians, one for each pair of neurons
PREFIXES = (  # torch.compile's, DDP's, FSDP's, Lightning's and those of models that hold a BDH
    *("_orig_mod.", "module.", "_fsdp_wrapped_module.", "model.", "core.", "bdh."),
    "backbone.",  # bdh-transformers'
)
LAYERED = (  # a tensor of one layer: its name in the model and the layer's number
    re.compile(r"(?:layers|blocks)\.(?P<layer>[0-9]{1,6})\.(?P<name>.+)"),
    re.compile(r"(?P<list>attn)s\.(?P<layer>[0-9]{1,6})\.(?P<name>.+)"),
    re.compile(r"(?P<name>.+)\.(?P<layer>[0-9]{1,6})"),
)


@dataclass(frozen=True, slots=True)
class Keys:
    """A state dict by the names of one kind: by `name`, or `name.layer` where layers have tensors of their own.

    `origins` has the file's key of each of them, `facts` the fields of the config that the keys show.
    """

    state: State
    origins: dict[str, str]
    facts: dict[str, Any]


def bare(key: str) -> str:
    """The key without what wraps the model."""
    while prefix := next((prefix for prefix in PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def layer_of(key: str) -> tuple[str, int | None]:
    """The name of a tensor without its layer's number, and that number."""
    for pattern in LAYERED:
        if match := pattern.fullmatch(key):
            owner = f"{match['list']}." if "list" in pattern.groupindex else ""
            return owner + match["name"], int(match["layer"])
    return key, None


def grouped(state: Mapping[str, Tensor], names: Mapping[str, str]) -> Keys:
    """The state dict by upstream's names.

    Args:
        names: upstream's, for those that the file has instead; others stay as they are.

    Raises:
        CheckpointError: two keys mean the same tensor, or a layer lacks what others have.
    """
    groups: dict[str, dict[int | None, str]] = {}
    problems = []
    for key in state:
        name, layer = layer_of(bare(key))
        members = groups.setdefault(names.get(name, name), {})
        if (other := members.setdefault(layer, key)) != key:
            problems.append(f"{shown(other)} and {shown(key)} are the same tensor")
    problems += _uneven(groups)
    if problems:
        raise CheckpointError(listed(problems))
    unshared = [name for name, members in groups.items() if not _is_shared(members, state)]
    if others := sorted(set(unshared) - {*MATRICES, *SCALES}):
        raise CheckpointError(f"{listed(map(shown, others), ', ')} differs between layers, which no BDH has")
    origins = {name: next(iter(members.values())) for name, members in groups.items() if name not in unshared}
    origins |= {f"{name}.{layer}": key for name in unshared for layer, key in groups[name].items()}
    return Keys({name: state[key] for name, key in origins.items()}, origins, _facts(groups, bool(unshared)))


def same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.is_floating_point() and a.dtype.itemsize > 1 and torch.equal(a, b))


def _facts(groups: Mapping[str, Mapping[int | None, str]], unshared: bool) -> dict[str, Any]:
    """How many layers there are, where keys count them, and whose the matrices are, where no layer has copies."""
    counts = [len(members) for members in groups.values() if None not in members]
    facts: dict[str, Any] = {"n_layer": counts[0]} if counts else {}
    if unshared or all(None in groups.get(name, {None: ""}) for name in MATRICES):
        facts["per_layer_weights"] = unshared
    return facts


def _uneven(groups: Mapping[str, Mapping[int | None, str]]) -> list[str]:
    """What is there for some layers and not for others."""
    layered = {name: members for name, members in groups.items() if set(members) != {None}}
    most = max((len(members) for members in layered.values()), default=0)
    return [
        f"{shown(name)} is there for {len(members)} of {most} layers, or with other numbers than 0 to {most - 1}"
        for name, members in layered.items()
        if set(members) != set(range(most))
    ]


def _is_shared(members: Mapping[int | None, str], state: Mapping[str, Tensor]) -> bool:
    """Layers may have copies of one tensor."""
    first = state[next(iter(members.values()))]
    return all(same(first, state[key]) for key in members.values())
