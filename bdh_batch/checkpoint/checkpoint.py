"""Checkpoints to weights: every file that `files` reads and `dialects` understands, checked; and the native folder.

A native folder holds `config.json` (upstream's `BDHConfig` fields, perhaps `trained_context`), `model.safetensors`,
`tokenizer_config.json`, `generation_config.json` and perhaps `chat_template.jinja`; the last three are not read here.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bdh_batch.checkpoint.config import MATRICES, NOTHING, ROPE_THETA, BDHConfig, Given
from bdh_batch.checkpoint.dialects import (
    EMBED,
    FREQUENCIES,
    HEAD,
    LATENT,
    ROPE,
    Tensors,
    arrange,
    upstream_fields,
    upstream_tensors,
)
from bdh_batch.checkpoint.files import CONFIG, WEIGHTS, State, read_source
from bdh_batch.errors import CheckpointError
from bdh_batch.kernels.base import Weights
from bdh_batch.system.device_memory import free_memory
from bdh_batch.system.documents import brief, listed, shown

log = logging.getLogger(__name__)

SPARE_KEYS = frozenset({FREQUENCIES, LATENT, "lm_gate"})  # the last is a leftover of older upstream versions
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDING, SMALLEST = 2.0**-7, 1e-7  # what 16 bits lose of a frequency: bfloat16 relatively, float16's least numbers
COMPUTED = 1e-4  # what two ways to compute a frequency in float32 may differ by, relatively
NEURON_FIELDS = frozenset({"mlp_internal_dim_multiplier", "head_neurons"})  # each says how many neurons there are
KEYS = "its keys"
UPSTREAM_LAYERS = BDHConfig().n_layer


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: its config, and its weights in memory.

    `neuron_order` [N]: for each neuron of a head as `weights` number them, its number in the checkpoint; None where
    they are the same.
    """

    config: BDHConfig
    weights: Weights
    neuron_order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds, in upstream's names: the right tensors in the right shapes, perhaps not yet read.

    `layers_known` is False where neither the file nor the caller gave the number of layers, and upstream's was taken.
    """

    file: Path
    config: BDHConfig
    state: State
    layers_known: bool

    def frequencies(self) -> Tensor:
        """RoPE's [N], float32, in the file's order. What was saved narrower has lost the phases: then they are computed
        anew."""
        saved = self.state.get(FREQUENCIES)
        if saved is None or saved.dtype.itemsize < torch.float32.itemsize:
            return self.config.frequencies()
        return saved.flatten().float()

    def check_finite(self) -> None:
        """Reads all weights.

        Raises:
            CheckpointError: some are NaN or infinite; the message counts them.
        """
        _check_finite({key: self.state[key] for key in self.config.shapes()}, self.file)


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
    weights = _weights(checkpoint, dtype, device)
    return Model(checkpoint.config, weights, checkpoint.config.neuron_order())


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
        fields = None if source.values is None else upstream_fields(source.values)
    said = {} if fields is None else fields.values
    with _blaming(source.file):
        tensors = upstream_tensors(source.state, fields)
        sizes = _sizes(tensors.state, said, fields is None)
    with _blaming(source.config_file):
        BDHConfig.from_dict(sizes | said)  # what is wrong by itself is reported before what contradicts
        known = _settled(said, tensors.facts, given)
        config = BDHConfig.from_dict(sizes | known)
    with _blaming(source.file):
        arrange(tensors, config)
        _check(tensors, config, known.keys(), fields is not None and fields.rope)
    return Checkpoint(source.file, config, tensors.state, "n_layer" in known)


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
        (CONFIG, config.described()),
        ("tokenizer_config.json", {"type": "byte"}),
        ("generation_config.json", dict(generation)),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _check_memory(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    size = sum(checkpoint.state[key].numel() for key in checkpoint.config.shapes()) * dtype.itemsize
    if size > (free := free_memory(device)):
        text = f"its weights take {size:,} bytes in {_short(dtype)} (model.dtype), and {free:,} are free on {device}"
        raise CheckpointError(f"{checkpoint.file}: {text}")


@contextlib.contextmanager
def _blaming(file: Path) -> Iterator[None]:
    """Errors inside begin with the file that is at fault."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _settled(fields: Mapping[str, Any], facts: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """The fields of the config that are known, by whoever says them.

    Raises:
        CheckpointError: two say something different.
    """
    known = {name: ("its config", value) for name, value in fields.items()}
    for name, (who, value) in [*((name, (KEYS, value)) for name, value in facts.items()), *given.fields().items()]:
        first, other = known.setdefault(name, (who, value))
        if other != value:
            says = "say" if who == KEYS else "says"
            raise CheckpointError(f"{name}: {first} says {brief(other)}, {who} {says} {brief(value)}")
    return {name: value for name, (_, value) in known.items()}


def _sizes(state: State, said: Collection[str], needed: bool) -> dict[str, int]:
    """What the shapes show of the model, and the config does not say."""
    encoder, embed = state.get("encoder", state.get("encoder.0")), state.get(EMBED)
    if encoder is None or embed is None or encoder.ndim != 3 or embed.ndim != 2 or not encoder.numel():
        if not needed:
            return {}
        raise CheckpointError(
            f"no {CONFIG} beside it, and without encoder [heads, D, N] and embed.weight [V, D] none can be "
            f"inferred; found {_listing(state)}"
        )
    heads, width, neurons = encoder.shape
    sizes = {"n_embd": width, "n_head": heads, "vocab_size": embed.shape[0]}
    if NEURON_FIELDS.isdisjoint(said):
        of_width, rest = divmod(heads * neurons, width)
        sizes |= {"head_neurons": neurons} if rest else {"mlp_internal_dim_multiplier": of_width}
    return {name: size for name, size in sizes.items() if name not in said}


def _check(tensors: Tensors, config: BDHConfig, known: Collection[str], rope_known: bool) -> None:
    state, expected = tensors.state, config.shapes()

    def name(key: str) -> str:
        origin = tensors.origins.get(key, key)
        return shown(key) if origin == key else f"{shown(origin)} ({shown(key)})"

    problems = [f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in state]
    problems += [f"extra {name(key)}" for key in sorted(state.keys() - expected.keys() - SPARE_KEYS)]
    present = {key: state[key] for key in expected if key in state}
    problems += [
        f"{name(key)} has shape {list(tensor.shape)}, not {list(expected[key])}"
        for key, tensor in present.items()
        if tensor.shape != expected[key]
    ]
    problems += [
        f"{name(key)} holds {_short(tensor.dtype)}, not floats of 16, 32 or 64 bits"
        for key, tensor in present.items()
        if tensor.dtype not in DTYPES
    ]
    if FREQUENCIES in state:
        problems += [
            f"{name(FREQUENCIES)} {problem}" for problem in _frequency_problems(state[FREQUENCIES], config, known)
        ]
    elif not config.turning or rope_known or _says_rope(config, known):
        pass  # computed
    else:
        problems.append(
            f"missing {FREQUENCIES} [1, 1, 1, {config.neurons_per_head}], without which RoPE is not known; say what it "
            f"is by {ROPE} and rope_layout in {CONFIG} or in the settings (model.{ROPE}, model.rope_layout); "
            f'"{ROPE}": {ROPE_THETA:.0f} alone is upstream\'s'
        )
    if (latent := state.get(LATENT)) is not None:
        if not config.latent_steps:
            problems.append(f"{name(LATENT)} is there, and latent_steps is not true in the config")
        if latent.shape != (config.n_embd,) or latent.dtype not in DTYPES:
            problems.append(f"{name(LATENT)} should be floats of the shape [{config.n_embd}]")
    if problems:
        raise CheckpointError(listed(problems))


def _says_rope(config: BDHConfig, known: Collection[str]) -> bool:
    """Upstream's base is known to be used by upstream's layout; of others both have to be said."""
    return ROPE in known and (config.rope_theta == ROPE_THETA or "rope_layout" in known)


def _frequency_problems(saved: Tensor, config: BDHConfig, known: Collection[str]) -> list[str]:
    """The phases are part of the model: those of any base are served as they are, if they are RoPE's at all."""
    neurons, turning = config.neurons_per_head, config.turning
    if saved.numel() != neurons:
        return [f"has {saved.numel()} elements, not {neurons}"]
    if saved.dtype not in DTYPES:
        return [f"holds {_short(saved.dtype)}, not floats of 16, 32 or 64 bits"]
    turns = saved.flatten().float()
    ordered = turns if (order := config.neuron_order()) is None else turns[order]
    if not turns.isfinite().all() or not torch.equal(ordered[::2], ordered[1::2]):
        pairs = "2i and 2i + 1" if config.rope_layout == "interleaved" else f"i and i + {turning // 2}"
        return [f"should be finite, and the same for neurons {pairs} (rope_layout {config.rope_layout})"]
    if turns[turning:].any():
        return [f"should be 0 from neuron {turning} on (rotary_dim)"]
    narrow = saved.dtype.itemsize < torch.float32.itemsize
    rounding, smallest = (ROUNDING, SMALLEST) if narrow else (COMPUTED, 0.0)
    if torch.allclose(turns, config.frequencies(), rounding, smallest):
        return []
    if ROPE in known:
        return [f"is not of {ROPE} {config.rope_theta:g}; leave one of them out"]
    if narrow:
        base = f"{config.rope_theta:g}"
        return [f"is in {_short(saved.dtype)}, which is too coarse, and its base is not {base}; save it in float32"]
    return []


def _check_finite(state: Mapping[str, Tensor], file: Path) -> None:
    bad = {key: int(tensor.numel() - tensor.isfinite().sum()) for key, tensor in state.items()}
    problems = [
        f"{key} has {count} numbers of {state[key].numel()} that are NaN or infinite in {_short(state[key].dtype)}"
        for key, count in bad.items()
        if count
    ]
    if problems:
        raise CheckpointError(f"{file}: " + listed(problems))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listing(state: State) -> str:
    return listed((f"{shown(key)} {list(tensor.shape)}" for key, tensor in sorted(state.items())), ", ") or "nothing"
