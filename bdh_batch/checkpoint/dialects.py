"""Other people's names for BDH's config and tensors, to upstream's (pathwaycom/bdh, `bdh.py`).

Known are upstream's own, with what `torch.compile`, DDP, FSDP and Lightning put before them; bdh-transformers'
(`backbone.…`, `num_hidden_layers`); and a matrix for each layer, where all layers' are the same. The names of the
paper's listing are known and refused: models of those names differ in what neither names nor sizes show. Knows nothing
about files; the errors here are completed with one by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields as fields_of
from typing import Any

import torch
from torch import Tensor

from bdh_batch.checkpoint.config import MATRICES, BDHConfig
from bdh_batch.checkpoint.files import State
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import brief, listed, shown

EMBED, HEAD, FREQUENCIES, LATENT = "embed.weight", "lm_head", "attn.freqs", "latent_step_embed"
PREFIXES = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "model.")  # torch.compile's, DDP's, FSDP's, Lightning's
BACKBONE, LINEAR_HEAD = "backbone.", "lm_head.weight"  # bdh-transformers'; an nn.Linear is [V, D], upstream's is [D, V]
PAPER = {"wte.weight": EMBED, "decoder_x": "encoder", "decoder_y": "encoder_v", "encoder": "decoder", "readout": HEAD}
LAYERED = (  # a tensor of one layer: its name in the model and the layer's number
    re.compile(r"(?:layers|blocks)\.(?P<layer>[0-9]{1,6})\.(?P<name>.+)"),
    re.compile(r"(?P<list>attn)s\.(?P<layer>[0-9]{1,6})\.(?P<name>.+)"),
    re.compile(r"(?P<name>.+)\.(?P<layer>[0-9]{1,6})"),
)

FIELDS = {
    **{"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"},
    "sliding_window": "attention_window",  # bdh-transformers'
    "block_size": "trained_context",  # trainers': the length of what they train on
    **{"L": "n_layer", "D": "n_embd", "H": "n_head"},  # the paper's
}
NEURONS = "N"  # the paper's, of all heads
ROPE = "rope_theta"
NULLABLE = {*FIELDS, ROPE, "rope_layout", "norm"}  # null is as good as not there
KNOWN = {field.name for field in fields_of(BDHConfig)} | FIELDS.keys() | {NEURONS}
OWN = {"trained_context", "attention_window"}  # fields that only this project writes
TIES = ("tie_word_embeddings", "tie_weights")
SAYS_NOTHING = frozenset(  # about the forward pass
    {
        # what transformers writes besides
        *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures"),
        *("attn_implementation", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range"),
        *("is_decoder", "label2id", "max_position_embeddings", "model_type", "output_attentions"),
        *("output_hidden_states", "pad_token_id", "return_dict", "torch_dtype", "transformers_version", "use_cache"),
        # and trainers
        *("batch_size", "compile", "device", "epochs", "grad_clip", "gradient_accumulation_steps", "learning_rate"),
        *("lr", "max_iters", "max_steps", "seed", "warmup_steps", "weight_decay"),
    }
)


@dataclass(frozen=True, slots=True)
class Fields:
    """A config in upstream's names.

    `tied`: whether it says that the head is the embedding; None: it does not say. `rope`: whether whoever wrote it is
    known to use upstream's RoPE, so that neither it nor its frequencies need be in the file.
    """

    values: dict[str, Any]
    tied: bool | None
    hugging_face: bool
    rope: bool


@dataclass(frozen=True, slots=True)
class Tensors:
    """A state dict in upstream's names, and for each of them the file's; `facts` are fields of the config that the keys
    show."""

    state: State
    origins: dict[str, str]
    facts: dict[str, Any]


def upstream_fields(values: Mapping[str, Any]) -> Fields:
    """The config in upstream's names; fields that it does not know stay as they are.

    Raises:
        CheckpointError: of another architecture, or a field is said twice and differently.
    """
    kind = values.get("model_type")
    if kind not in (None, "bdh"):
        raise CheckpointError(f"config: model_type is {shown(kind)[:100]}; only bdh can be served")
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in SAYS_NOTHING or name in TIES or name == NEURONS or (name in NULLABLE and value is None):
            continue
        _check_plain(name, value)
        field = FIELDS.get(name, name)
        if field in found and found[field] != value:
            raise CheckpointError(f"config: {field} is said twice, as {brief(found[field])} and as {brief(value)}")
        found[field] = value
    if NEURONS in values:
        _check_plain(NEURONS, values[NEURONS])
        found.setdefault("mlp_internal_dim_multiplier", _multiplier(values[NEURONS], found.get("n_embd")))
    _check_neurons(found)
    ties = [values[name] for name in TIES if name in values]
    if not all(isinstance(tied, bool) for tied in ties) or len(set(ties)) > 1:
        raise CheckpointError(f"config: {' and '.join(TIES)} should be true or false")
    return Fields(found, ties[0] if ties else None, kind is not None, _rope_is_known(values))


def _check_neurons(values: Mapping[str, Any]) -> None:
    """What is said twice should be said alike."""
    names = ("mlp_internal_dim_multiplier", "n_embd", "n_head", "head_neurons")
    if all(isinstance(values.get(name), int) for name in names):
        multiplier, width, heads, neurons = (values[name] for name in names)
        if heads and neurons != (product := multiplier * width // heads):
            text = f"mlp_internal_dim_multiplier {brief(multiplier)} * n_embd {brief(width)} // n_head {brief(heads)}"
            raise CheckpointError(
                f"config: head_neurons is {brief(neurons)}, and {text} is {brief(product)}; leave one of them out"
            )


def _check_plain(name: str, value: object) -> None:
    """A pickle's config can hold anything at all."""
    if name in KNOWN and not isinstance(value, bool | int | float | str | None):
        raise CheckpointError(f"config: {name} has a value that no config can have, a {type(value).__name__}")


def _multiplier(neurons: object, width: object) -> int:
    if not isinstance(neurons, int) or not isinstance(width, int) or width < 1 or neurons % width:
        text = f"{NEURONS} should be a multiple of D, not {brief(neurons)} of {brief(width)}"
        raise CheckpointError(f"config: {text}")
    return neurons // width


def _rope_is_known(values: Mapping[str, Any]) -> bool:
    """Of bdh-transformers, and of what this project has written, upstream's is known where nothing is said."""
    return values.get("model_type") == "bdh" or not OWN.isdisjoint(values)


def upstream_tensors(state: Mapping[str, Tensor], fields: Fields | None) -> Tensors:
    """The state dict in upstream's names; keys that are not known stay as they are.

    Raises:
        CheckpointError: two keys mean the same tensor, layers have matrices of their own, or a tied head is not tied.
    """
    bare = {key: _without_prefixes(key) for key in state}
    hugging_face = any(name.startswith(BACKBONE) or name == LINEAR_HEAD for name in bare.values())
    parts = {key: _layer_of(name.removeprefix(BACKBONE)) for key, name in bare.items()}
    _refuse_paper({name for name, _ in parts.values()})
    groups: dict[str, dict[int | None, str]] = {}
    problems = []
    for key, (name, layer) in parts.items():
        members = groups.setdefault(HEAD if name == LINEAR_HEAD else name, {})
        if (other := members.setdefault(layer, key)) != key:
            problems.append(f"{shown(other)} and {shown(key)} are the same tensor")
    problems += _uneven(groups)
    if problems:
        raise CheckpointError(listed(problems))
    unshared = [name for name, members in groups.items() if not _is_shared(members, state)]
    if others := sorted(set(unshared) - set(MATRICES)):
        raise CheckpointError(f"{listed(map(shown, others), ', ')} differs between layers, which no BDH has")
    origins = {name: next(iter(members.values())) for name, members in groups.items() if name not in unshared}
    origins |= {f"{name}.{layer}": key for name in unshared for layer, key in groups[name].items()}
    found = {name: _turned(parts[key][0], state[key]) for name, key in origins.items()}
    _tie(found, fields, hugging_face or (fields is not None and fields.hugging_face))
    counts = [len(members) for members in groups.values() if None not in members]
    facts: dict[str, Any] = {"n_layer": counts[0]} if counts else {}
    if unshared or not any(None not in groups.get(name, {None}) for name in MATRICES):
        facts["per_layer_weights"] = bool(unshared)
    return Tensors(found, origins, facts)


def arrange(tensors: Tensors, config: BDHConfig) -> None:
    """Gives every layer its matrices, where the config says that it has some: a file may hold what is shared once."""
    if not config.per_layer_weights:
        return
    for name in MATRICES:
        if name in tensors.state:
            tensor, origin = tensors.state.pop(name), tensors.origins.pop(name)
            tensors.state.update(dict.fromkeys(config.matrix_keys(name), tensor))
            tensors.origins.update(dict.fromkeys(config.matrix_keys(name), origin))


def _refuse_paper(names: set[str]) -> None:
    """Two models of the paper's names and the same sizes can be different functions."""
    if found := sorted(names & (PAPER.keys() - {"encoder"})):
        renamed = ", ".join(f"{paper} is {upstream}" for paper, upstream in PAPER.items())
        raise CheckpointError(
            f"has the paper's names ({', '.join(found)}), whose models differ in what the file does not say: where "
            "LayerNorm is applied, RoPE's base and how it pairs neurons. Where all of it is as in upstream's bdh.py, "
            f"save the tensors by upstream's names ({renamed}), with {FREQUENCIES}"
        )


def _without_prefixes(key: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    return key


def _layer_of(key: str) -> tuple[str, int | None]:
    """The name of a tensor without its layer's number, and that number."""
    for pattern in LAYERED:
        if match := pattern.fullmatch(key):
            owner = f"{match['list']}." if "list" in pattern.groupindex else ""
            return owner + match["name"], int(match["layer"])
    return key, None


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.mT if name == LINEAR_HEAD and tensor.ndim == 2 else tensor


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


def _tie(state: State, fields: Fields | None, hugging_face: bool) -> None:
    """The head is the embedding where the config says so, and in bdh-transformers' files where neither is said."""
    tied = None if fields is None else fields.tied
    embed, head = state.get(EMBED), state.get(HEAD)
    if embed is None or embed.ndim != 2:
        return
    if head is None and (hugging_face if tied is None else tied):
        state[HEAD] = embed.mT
    elif head is not None and tied and not same(head, embed.mT):
        raise CheckpointError(
            f"{HEAD} is not the embedding, though the config ties them; set tie_word_embeddings to false in "
            "config.json to serve the head, or leave the head out of the file to serve the embedding"
        )


def same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.is_floating_point() and a.dtype.itemsize > 1 and torch.equal(a, b))
