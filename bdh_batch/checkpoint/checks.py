"""What a checkpoint's config, keys and shapes say, and the settings besides: that they agree, and that nothing is open.

Every problem is listed, by the file's own keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bdh_batch.checkpoint import int8
from bdh_batch.checkpoint.config import ROPE_THETA, BDHConfig, Given
from bdh_batch.checkpoint.dialects.fields import NEURONS, Fields
from bdh_batch.checkpoint.dialects.keys import EMBED, FREQUENCIES, LATENT, RADIANS
from bdh_batch.checkpoint.dialects.kinds import CQ, Tensors
from bdh_batch.checkpoint.files import CONFIG, State
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import brief, listed, shown

ROPE, LAYOUT, ROTARY = "rope_theta", "rope_layout", "rotary_dim"
HALF_THETA = 10_000.0  # the base of those who turn halves, where none is given
SPARE_KEYS = frozenset({FREQUENCIES, LATENT, "lm_gate"})  # the last is a leftover of older upstream versions
NEURON_FIELDS = frozenset({"mlp_internal_dim_multiplier", "head_neurons"})  # each says how many neurons there are
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDING, SMALLEST = 2.0**-7, 1e-7  # what 16 bits lose of a frequency: bfloat16 relatively, float16's least numbers
COMPUTED = 1e-4  # what two ways to compute a frequency in float32 may differ by, relatively
KEYS = "its keys"


def sizes_of(tensors: Tensors, fields: Fields, needed: bool) -> dict[str, int]:
    """What the shapes show of the model, and the config does not say.

    Args:
        needed: there is no config.

    Raises:
        CheckpointError: there is no config, and it cannot be inferred; or the config counts other neurons.
    """
    state = tensors.state
    encoder, embed = state.get("encoder", state.get("encoder.0")), state.get(EMBED)
    if encoder is None or embed is None or encoder.ndim != 3 or embed.ndim != 2 or not encoder.numel():
        if not needed:
            return {}
        encoder_key, embed_key = tensors.kind.key("encoder"), tensors.kind.key(EMBED)
        raise CheckpointError(
            f"no {CONFIG} beside it, and without {encoder_key} [heads, D, N] and {embed_key} [V, D] none can be "
            f"inferred; found {_listing(state)}"
        )
    heads, width, neurons = encoder.shape
    _check_neurons(fields.neurons, heads, tensors.neurons or neurons)
    sizes = {"n_embd": width, "n_head": heads, "vocab_size": embed.shape[0]}
    if NEURON_FIELDS.isdisjoint(fields.values):
        of_width, rest = divmod(heads * neurons, width)
        sizes |= {"head_neurons": neurons} if rest else {"mlp_internal_dim_multiplier": of_width}
    return {name: size for name, size in sizes.items() if name not in fields.values}


def _check_neurons(counts: Mapping[str, int], heads: int, neurons: int) -> None:
    for name, value in counts.items():
        if value != heads * neurons and (name != "n_neurons" or value != neurons):
            text = f"its {heads} heads have {neurons:,} neurons each, {heads * neurons:,} together"
            raise CheckpointError(f"{name} in its config is {brief(value)} ({NEURONS[name]}), and {text}")


def settled(fields: Mapping[str, Any], tensors: Tensors, given: Given) -> dict[str, Any]:
    """The fields of the config that are known, by whoever says them.

    Raises:
        CheckpointError: two say something different.
    """
    known = {name: ("its config", value) for name, value in fields.items()}
    facts = {name: (KEYS, value) for name, value in tensors.facts.items()}
    for name, (who, value) in [*facts.items(), *given.fields().items()]:
        first, other = known.setdefault(name, (who, value))
        if other != value:
            verbs = ("say" if each == KEYS else "says" for each in (first, who))
            said = (f"{each} {verb} {brief(what)}" for each, verb, what in zip((first, who), verbs, (other, value)))
            raise CheckpointError(f"{name}: {', '.join(said)}")
    values = {name: value for name, (_, value) in known.items()}
    if values.get(LAYOUT) == "half" and ROPE not in values and not {FREQUENCIES, RADIANS} & tensors.state.keys():
        values[ROPE] = HALF_THETA
    return values


def check_open(tensors: Tensors, known: Collection[str]) -> None:
    """Two models of one kind and the same sizes can be different functions.

    Raises:
        CheckpointError: the kind leaves something open that nobody says.
    """
    kind = tensors.kind
    if all(name in known for name in kind.open):
        return
    if kind is CQ:
        raise CheckpointError(
            f"is a bdh-cq, whose file does not say its depth; give model.layers, or depth in its {CONFIG}"
        )
    marks = ", ".join(map(shown, sorted(set(map(kind.key, tensors.state)) & kind.marks)))
    options = " and ".join(f"model.{name}" for name in kind.open)
    raise CheckpointError(
        f"has the names of {kind.name} ({marks}), whose models differ in what the file does not say: where "
        "LayerNorm is applied (every_layer or final), and which neurons RoPE turns together (interleaved or half). "
        f"Give {options}, and model.{ROPE} where RoPE's base is not 65536 if interleaved, or 10000 if half; or say "
        f"them in its {CONFIG}"
    )


def check(tensors: Tensors, config: BDHConfig, fields: Fields, known: Collection[str]) -> None:
    """
    Raises:
        CheckpointError: keys or shapes are not those of the config, or RoPE is not known; all of it is listed.
    """
    state, expected = tensors.state, config.shapes()

    def name(key: str) -> str:
        origin = tensors.origins.get(key, tensors.kind.key(key))
        return shown(key) if origin == key else f"{shown(origin)} ({shown(key)})"

    problems = [f"missing {name(key)} {list(shape)}" for key, shape in expected.items() if key not in state]
    spare = {*SPARE_KEYS, RADIANS, *map(int8.scales_key, expected)}
    problems += [f"extra {name(key)}" for key in sorted(state.keys() - expected.keys() - spare)]
    problems += int8.problems_of(state, expected)
    present = {key: state[key] for key in expected if key in state}
    problems += [
        f"{name(key)} has shape {list(tensor.shape)}, not {list(expected[key])}"
        for key, tensor in present.items()
        if tensor.shape != expected[key]
    ]
    problems += [
        f"{name(key)} holds {dtype_name(tensor.dtype)}, not floats of 16, 32 or 64 bits"
        for key, tensor in present.items()
        if tensor.dtype not in DTYPES and not (tensor.dtype == torch.int8 and int8.scales_key(key) in state)
    ]
    if RADIANS in state:
        text = f"has {state[RADIANS].numel()} elements of {dtype_name(state[RADIANS].dtype)}"
        problems.append(f"{name(RADIANS)} {text}, not {config.turning // 2} floats ({ROTARY} {config.turning})")
    elif FREQUENCIES in state:
        problems += [
            f"{name(FREQUENCIES)} {problem}" for problem in _frequency_problems(state[FREQUENCIES], config, known)
        ]
    elif config.turning and not _says_rope(tensors, config, fields, known):
        problems.append(_missing_rope(tensors, config))
    problems += [f"{name(LATENT)} {problem}" for problem in _latent_problems(state.get(LATENT), config, fields)]
    if problems:
        raise CheckpointError(listed(problems))


def _says_rope(tensors: Tensors, config: BDHConfig, fields: Fields, known: Collection[str]) -> bool:
    """Whether the frequencies follow from what is known. Of upstream's base upstream's layout is known, too."""
    if tensors.kind is CQ:
        return ROPE in known and ROTARY in known
    return fields.rope or LAYOUT in known or (ROPE in known and config.rope_theta == ROPE_THETA)


def _missing_rope(tensors: Tensors, config: BDHConfig) -> str:
    if tensors.kind is CQ:
        return f'missing rope.freqs [{ROTARY} / 2]; a model without positions has "{ROTARY}": 0 in its {CONFIG}'
    return (
        f"missing {FREQUENCIES} [1, 1, 1, {config.neurons_per_head}], without which RoPE is not known; say what it is "
        f"by {ROPE} and {LAYOUT} in {CONFIG} or in the settings (model.{ROPE}, model.{LAYOUT}); "
        f'"{ROPE}": {ROPE_THETA:.0f} alone is upstream\'s'
    )


def _latent_problems(latent: Tensor | None, config: BDHConfig, fields: Fields) -> list[str]:
    if fields.latent_embed is not None and fields.latent_embed != (latent is not None):
        return [f"is {'missing' if latent is None else 'there'}, and {LATENT} in its config says otherwise"]
    if latent is None:
        return []
    if not config.latent_steps:
        return ["is there, and latent_steps is not true in its config"]
    if latent.shape != (config.n_embd,) or latent.dtype not in DTYPES:
        return [f"should be floats of the shape [{config.n_embd}]"]
    return []


def _frequency_problems(saved: Tensor, config: BDHConfig, known: Collection[str]) -> list[str]:
    """The phases are part of the model: those of any base are served as they are, if they are RoPE's at all."""
    neurons, turning = config.neurons_per_head, config.turning
    if saved.numel() != neurons:
        return [f"has {saved.numel()} elements, not {neurons}"]
    if saved.dtype not in DTYPES:
        return [f"holds {dtype_name(saved.dtype)}, not floats of 16, 32 or 64 bits"]
    turns = saved.flatten().float()
    ordered = turns if (order := config.neuron_order()) is None else turns[order]
    if not turns.isfinite().all() or not torch.equal(ordered[::2], ordered[1::2]):
        pairs = "2i and 2i + 1" if order is None else f"i and i + {turning // 2}"
        return [f"should be finite, and the same for neurons {pairs} ({LAYOUT} {config.rope_layout})"]
    if turns[turning:].any():
        return [f"should be 0 from neuron {turning} on ({ROTARY})"]
    narrow = saved.dtype.itemsize < torch.float32.itemsize
    if frequencies_agree(turns, config, narrow):
        return []
    if ROPE in known:
        return [f"is not of {ROPE} {config.rope_theta:g}; leave one of them out"]
    if narrow:
        base = f"{config.rope_theta:g}"
        return [f"is in {dtype_name(saved.dtype)}, which is too coarse, and its base is not {base}; save it in float32"]
    return []


def frequencies_agree(turns: Tensor, config: BDHConfig, narrow: bool = False) -> bool:
    """Whether frequencies [N] are those of the config's base; `narrow`: as far as 16 bits can tell."""
    rounding, smallest = (ROUNDING, SMALLEST) if narrow else (COMPUTED, 0.0)
    return len(turns) == config.neurons_per_head and torch.allclose(turns, config.frequencies(), rounding, smallest)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listing(state: State) -> str:
    return listed((f"{shown(key)} {list(tensor.shape)}" for key, tensor in sorted(state.items())), ", ") or "nothing"
