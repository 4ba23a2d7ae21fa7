"""Other people's configs, to upstream's fields.

What is not about the forward pass is left out. A field of a variant is, too, where its value is the neutral one, which
leaves upstream's model as it is; another value is refused by name and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields as fields_of
from typing import Any

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import brief, shown

CQ = {"dim": "n_embd", "num_tokens": "vocab_size", "depth": "n_layer", "heads": "n_head"}  # bdh-cq's
OTHERS = {
    **{"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"},  # bdh-transformers'
    **{"L": "n_layer", "D": "n_embd", "H": "n_head"},  # the paper's
}
FIELDS = {
    **CQ,
    **OTHERS,
    "sliding_window": "attention_window",  # bdh-transformers'
    "block_size": "trained_context",  # trainers': the length of what they train on
}
NEURONS = {"N": "of all heads", "dim_qk_heads": "of all heads", "n_neurons": "of all heads, or of one"}
CQ_FIELDS = {*CQ, "dim_qk_heads"}
UPSTREAM_FIELDS = {"n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "head_neurons", *OTHERS}
OWN = {"trained_context", "attention_window"}  # fields that only this project writes
TIES = ("tie_word_embeddings", "tie_weights")
LATENT_EMBED = "latent_step_embed"  # bdh-cq's: whether there is one
NULLABLE = {*FIELDS, "norm", "rope_layout", "rope_theta", "per_layer_weights", "latent_steps"}  # null says nothing
KNOWN = {field.name for field in fields_of(BDHConfig)} | FIELDS.keys() | NEURONS.keys()
CQ_TYPES = {"bdh-cq", "bdh_cq"}
MODEL_TYPES = (None, "bdh", *CQ_TYPES)

NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields of variants, and what leaves them out
    "attn_window": (None,),
    "attn_residual": (None, False),
    "attn_residual_depth_bias_distance": (None, 0),
    "forget_mode": (None, "none"),
    "latent_token_id": (None,),
    "triadic": (None, False),
    "u_decay": (None, 1),
}
SAYS_NOTHING = frozenset(  # about the forward pass
    {
        # what transformers writes besides
        *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures"),
        *("attn_implementation", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "initializer_range"),
        *("is_decoder", "label2id", "max_position_embeddings", "model_type", "output_attentions"),
        *("output_hidden_states", "pad_token_id", "return_dict", "torch_dtype", "transformers_version", "use_cache"),
        # trainers
        *("batch_size", "compile", "device", "epochs", "grad_clip", "gradient_accumulation_steps", "learning_rate"),
        *("lr", "max_iters", "max_steps", "seed", "warmup_steps", "weight_decay"),
        # folders with a tokenizer
        *("max_seq_len", "tokenizer_path", "tokenizer_type", "tokenizer_vocab_size", "unk_token_id"),
        # and bdh-cq, of what another field switches on, or of training
        *("attn_residual_tied", "ignore_index", "triadic_dim"),
    }
)


@dataclass(frozen=True, slots=True)
class Fields:
    """A config in upstream's names.

    Attributes:
        neurons: how many there are, by fields that count them otherwise than upstream.
        tied: whether it says that the head is the embedding; None: it does not say.
        latent_embed: whether it says that latent steps have an embedding of their own; None: it does not say.
        hugging_face: whether transformers wrote it.
        rope: whether who wrote it is known to use upstream's RoPE, so that the file need not say it.
        cq: fields of bdh-cq in it, and its name.
        upstream: fields that no bdh-cq has.
    """

    values: dict[str, Any]
    neurons: dict[str, int]
    tied: bool | None
    latent_embed: bool | None
    hugging_face: bool
    rope: bool
    cq: list[str]
    upstream: list[str]


def read_fields(values: Mapping[str, Any]) -> Fields:
    """The config in upstream's names; fields that it does not know stay as they are.

    Raises:
        CheckpointError: of another architecture, or a field is said twice and differently.
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"config: model_type is {shown(kind)[:100]}; only bdh can be served")
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in NEUTRAL:
            _check_neutral(name, value)
        elif name not in SAYS_NOTHING and not (name in NULLABLE and value is None):
            _check_plain(name, value)
            field = FIELDS.get(name, name)
            if field in found and found[field] != value:
                raise CheckpointError(f"config: {field} is said twice, as {brief(found[field])} and as {brief(value)}")
            found[field] = value
    neurons = {name: _count(name, found.pop(name)) for name in NEURONS if name in found}
    tied = _flag(found, TIES)
    latent = _flag(found, (LATENT_EMBED,))
    _check_neurons(found)
    rope = kind == "bdh" or not OWN.isdisjoint(values)
    of_cq, of_others = (sorted(names & values.keys()) for names in (CQ_FIELDS, UPSTREAM_FIELDS))
    return Fields(found, neurons, tied, latent, kind == "bdh", rope, [*of_cq, *CQ_TYPES & {kind}], of_others)


def _check_plain(name: str, value: object) -> None:
    """A pickle's config can hold anything at all."""
    if name in KNOWN and not isinstance(value, bool | int | float | str | None):
        raise CheckpointError(f"config: {name} has a value that no config can have, a {type(value).__name__}")


def _check_neutral(name: str, value: object) -> None:
    neutral = NEUTRAL[name]
    plain = isinstance(value, bool | int | float | str | None)
    if not plain or not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
        text = f"{name} is {brief(value)}, a variant that is not computed here; only {brief(neutral[-1])} is"
        raise CheckpointError(f"config: {text}")


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config: {name} must be a positive integer, not {brief(value)}")
    return value


def _flag(values: dict[str, Any], names: tuple[str, ...]) -> bool | None:
    """Takes a yes or no of several names out of `values`; None where none of them is there."""
    found = [values.pop(name) for name in names if name in values]
    if not all(isinstance(value, bool) for value in found) or len(set(found)) > 1:
        raise CheckpointError(f"config: {' and '.join(names)} should be true or false")
    return found[0] if found else None


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
