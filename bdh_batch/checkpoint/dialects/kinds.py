"""The kinds of checkpoints that people have, told by their keys, to upstream's names (pathwaycom/bdh, `bdh.py`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bdh_batch.checkpoint.config import MATRICES, SCALES, BDHConfig
from bdh_batch.checkpoint.dialects import cq
from bdh_batch.checkpoint.dialects.fields import Fields
from bdh_batch.checkpoint.dialects.keys import EMBED, FREQUENCIES, HEAD, RADIANS, bare, grouped, layer_of, same
from bdh_batch.checkpoint.dialects.unknown import refuse_unknown
from bdh_batch.checkpoint.files import State
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import shown

LINEAR_HEAD = "lm_head.weight"  # an nn.Linear is [V, D], upstream's is [D, V]
SCALARS = {"step", "loss", "epoch"}  # of training, which trainers put beside the tensors where all is in one list


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of checkpoint: its name, what its keys are called in upstream's model, and which of them tell it.

    `open` are fields of the config that models of the kind differ in, and that have no default.
    """

    name: str
    names: Mapping[str, str]
    marks: frozenset[str] = frozenset()
    open: tuple[str, ...] = ()

    def key(self, name: str) -> str:
        """What the kind calls a tensor of upstream's name."""
        return next((key for key, upstream in self.names.items() if upstream == name), name)


PLAIN = {"freqs": FREQUENCIES}
CQ = Kind("bdh-cq", cq.NAMES, cq.MARKS, ("n_layer",))
PAPER = Kind(
    "the paper's listing",
    {
        **{"wte.weight": EMBED, "decoder_x": "encoder", "decoder_y": "encoder_v", "encoder": "decoder"},
        **{"readout": HEAD, "wte": EMBED, **PLAIN},
    },
    frozenset({"wte.weight", "wte", "decoder_x", "decoder_y", "readout"}),
    ("norm", "rope_layout"),
)
MLX = Kind("MLX trainer", {"embed_weight": EMBED, "attn_freqs": FREQUENCIES}, frozenset({"embed_weight", "attn_freqs"}))
TRANSFORMERS = Kind("bdh-transformers", {LINEAR_HEAD: HEAD, **PLAIN}, frozenset({LINEAR_HEAD}))
UPSTREAM = Kind("upstream", PLAIN)
KINDS = (CQ, PAPER, MLX, TRANSFORMERS)


@dataclass(frozen=True, slots=True)
class Tensors:
    """A state dict in upstream's names, and for each of them the file's; `facts` are fields of the config that the keys
    show, and `neurons` how many of one head are in the file."""

    kind: Kind
    state: State
    origins: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    neurons: int | None = None


def read_tensors(state: Mapping[str, Tensor], fields: Fields) -> Tensors:
    """The state dict in upstream's names; keys that are not known stay as they are.

    Raises:
        CheckpointError: two keys mean the same tensor, the kind is one that cannot be served, the config is another
            kind's, or a tied head is not tied.
    """
    names = {layer_of(bare(key))[0] for key in state}
    refuse_unknown(names)
    kind = _kind_of(names)
    _check_config(kind, fields)
    radians = {name: RADIANS for name in names if name.rpartition(".")[2] == "inv_freq"}
    tensors = {key: tensor for key, tensor in state.items() if not _is_scalar(key, tensor)}
    keys = grouped(tensors, {**kind.names, **radians})
    found, facts = keys.state, keys.facts
    head = found.get(HEAD)
    if head is not None and bare(keys.origins[HEAD]) == LINEAR_HEAD and head.ndim == 2:
        found[HEAD] = head.mT
    up = found.get("encoder_v", found.get("encoder_v.0"))
    neurons = up.shape[-1] if up is not None and up.ndim == 3 else None
    if kind is CQ:
        facts |= cq.translate(found)
    backbone = any("backbone." in key for key in state)
    _tie(found, fields, kind is TRANSFORMERS or backbone or fields.hugging_face)
    return Tensors(kind, found, keys.origins, facts, neurons)


def arrange(tensors: Tensors, config: BDHConfig) -> None:
    """Gives every layer its matrices, where the config says that it has some: a file may hold what is shared once. And
    every neuron its frequency in turns, where the file has those of pairs in radians."""
    state, origins = tensors.state, tensors.origins
    for name in (*MATRICES, *SCALES) if config.per_layer_weights else ():
        if name in state:
            tensor, origin = state.pop(name), origins.pop(name)
            state.update(dict.fromkeys(config.matrix_keys(name), tensor))
            origins.update(dict.fromkeys(config.matrix_keys(name), origin))
    if RADIANS in state and 2 * state[RADIANS].numel() == config.turning and state[RADIANS].is_floating_point():
        origins[FREQUENCIES] = origins.pop(RADIANS)
        state[FREQUENCIES] = _turns(state.pop(RADIANS), config)


def _turns(radians: Tensor, config: BDHConfig) -> Tensor:
    pairs = radians.flatten().double() / (2 * torch.pi)
    turns = pairs.repeat_interleave(2) if config.rope_layout == "interleaved" else pairs.repeat(2)
    rest = torch.zeros(config.neurons_per_head - config.turning)
    return torch.cat((turns, rest)).to(radians.dtype)


def _kind_of(names: Collection[str]) -> Kind:
    return next((kind for kind in KINDS if not kind.marks.isdisjoint(names)), UPSTREAM)


def _check_config(kind: Kind, fields: Fields) -> None:
    strange = fields.upstream if kind is CQ else fields.cq
    if strange:
        other = "upstream's or another BDH" if kind is CQ else "a bdh-cq"
        holds = "holds the tensors of a bdh-cq" if kind is CQ else "does not hold those of a bdh-cq"
        raise CheckpointError(
            f"{holds}, and its config is that of {other} ({', '.join(map(shown, strange))}); put its own config.json "
            "beside it"
        )


def _is_scalar(key: str, tensor: Tensor) -> bool:
    return key in SCALARS and tensor.numel() == 1


def _tie(state: State, fields: Fields, hugging_face: bool) -> None:
    """The head is the embedding where the config says so, and in bdh-transformers' files where neither is said."""
    embed, head = state.get(EMBED), state.get(HEAD)
    if embed is None or embed.ndim != 2:
        return
    if head is None and (hugging_face if fields.tied is None else fields.tied):
        state[HEAD] = embed.mT
    elif head is not None and fields.tied and not same(head, embed.mT):
        raise CheckpointError(
            f"{HEAD} is not the embedding, though the config ties them; set tie_word_embeddings to false in "
            "config.json to serve the head, or leave the head out of the file to serve the embedding"
        )
