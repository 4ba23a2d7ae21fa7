"""Weights of int8: what a quantized folder holds, that it is the model rounded once, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdh_batch.checkpoint import int8
from bdh_batch.checkpoint.checkpoint import fingerprint, load_model, open_checkpoint
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.checkpoint.convert import convert
from bdh_batch.errors import CheckpointError
from bdh_batch.kernels.base import Weights
from tests.model import formats
from tests.model.formats import CPU, random_state

CONFIG = BDHConfig(n_layer=2, n_embd=6, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=256)
CONFIGS = {
    "shared": CONFIG,
    "by layer, halves": replace(CONFIG, per_layer_weights=True, rope_layout="half", rotary_dim=8, norm="final"),
    "one layer of its own": replace(CONFIG, n_layer=1, per_layer_weights=True, rope_layout="half"),
}


def wide(weights: Weights, name: str) -> Tensor:
    return int8.widen(getattr(weights, name), getattr(weights.scales, name), int8.across(name))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_quantized_folder_is_the_model_rounded_when_it_is_loaded(config: BDHConfig, tmp_path: Path) -> None:
    """The same in every bit, also quantized again, or converted; and the same as float32, if that is asked for."""
    source = formats.native(tmp_path / "source", config, random_state(config))
    convert(source, tmp_path / "int8", quantized=True)
    convert(tmp_path / "int8", tmp_path / "again", quantized=True)
    convert(tmp_path / "int8", tmp_path / "copy")
    narrow = load_model(source, torch.int8, CPU).weights
    found = {fingerprint(load_model(tmp_path / name, torch.int8, CPU).weights) for name in ("int8", "again", "copy")}
    assert found == {fingerprint(narrow)}
    served, exact = (load_model(each, torch.float32, CPU).weights for each in (tmp_path / "int8", source))
    assert fingerprint(served) != fingerprint(exact)
    assert torch.equal(served.embed, exact.embed)
    assert narrow.embed.dtype == torch.float32
    for name in ("encoder", "encoder_v", "decoder", "lm_head"):
        assert getattr(narrow, name).dtype == torch.int8
        assert torch.equal(getattr(served, name), wide(narrow, name))
        apart = (getattr(exact, name) - wide(narrow, name)).abs()
        steps = getattr(narrow.scales, name).unsqueeze(int8.across(name))
        assert (apart <= 0.501 * steps).all()
        assert (getattr(narrow, name).abs().amax(int8.across(name)) == int8.LARGEST).all()


def test_neurons_that_are_not_there_have_the_scale_0() -> None:
    integers, scales = int8.quantize(torch.tensor([[0.0, 2.0], [0.0, -4.0]]), -2)
    assert integers.tolist() == [[0, 64], [0, -127]]
    assert scales.tolist() == [0.0, pytest.approx(4 / 127)]


def test_the_bytes_are_counted_before_they_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = formats.native(tmp_path / "source", CONFIG, random_state(CONFIG))
    weights = load_model(source, torch.int8, CPU).weights
    tensors = [weights.embed, weights.encoder, weights.encoder_v, weights.decoder, weights.lm_head]
    assert weights.scales is not None
    tensors += [weights.scales.encoder, weights.scales.encoder_v, weights.scales.decoder, weights.scales.lm_head]
    size = sum(tensor.nbytes for tensor in tensors)
    assert int8.bytes_of_weights(CONFIG, torch.int8) == size
    monkeypatch.setattr("bdh_batch.checkpoint.checkpoint.free_memory", lambda device: size - 1)
    with pytest.raises(CheckpointError, match=rf"take {size:,} bytes in int8 \(model\.dtype\)"):
        load_model(source, torch.int8, CPU)


def broken(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    scales = state["encoder_scales"]
    changes: dict[str, dict[str, Any]] = {
        "missing": {"encoder_scales": None},
        "shape": {"encoder_scales": scales[:1].clone()},
        "dtype": {"encoder_scales": scales.half()},
        "extra": {"encoder": int8.widen(state["encoder"], scales, -2)},
        "negative": {"encoder_scales": -scales},
        "nan": {"encoder_scales": scales * torch.nan},
        "embedding": {"embed.weight": state["embed.weight"].to(torch.int8)},
    }
    return {key: tensor for key, tensor in (state | changes[name]).items() if tensor is not None}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", r"missing encoder_scales \[2, 12\], of encoder, which is int8"),
        ("shape", r"encoder_scales is \[1, 12\] of float32, not \[2, 12\] of float32"),
        ("dtype", r"encoder_scales is \[2, 12\] of float16, not \[2, 12\] of float32"),
        ("extra", r"extra encoder_scales, as encoder is not int8"),
        ("negative", r"encoder_scales has numbers below 0"),
        ("nan", r"encoder_scales has 24 numbers of 24 that are NaN"),
        ("embedding", r"embed\.weight holds int8, not floats"),
    ],
)
def test_a_damaged_one_is_refused_by_what_is_wrong(name: str, reason: str, tmp_path: Path) -> None:
    convert(formats.native(tmp_path / "source", CONFIG, random_state(CONFIG)), tmp_path / "int8", quantized=True)
    file = tmp_path / "int8" / "model.safetensors"
    save_file(broken(load_file(file), name), file)
    with pytest.raises(CheckpointError, match=reason):
        load_model(tmp_path / "int8", torch.int8, CPU)


def test_numbers_that_are_none_are_found_when_they_are_rounded(tmp_path: Path) -> None:
    state = random_state(CONFIG)
    source = formats.native(tmp_path / "source", CONFIG, state | {"lm_head": state["lm_head"] * torch.nan})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_model(source, torch.int8, CPU)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert(source, tmp_path / "int8", quantized=True)


def test_weights_of_other_dtypes_have_the_fingerprint_that_they_had(tmp_path: Path) -> None:
    """Files of states are known by it."""
    state = {key: torch.arange(tensor.numel()).view_as(tensor) / 8 for key, tensor in random_state(CONFIG).items()}
    weights = load_model(formats.native(tmp_path / "source", CONFIG, state), torch.float32, CPU).weights
    assert fingerprint(weights) == "b1218a7b4fb0fda5402b1aa7947f12e7"
    assert open_checkpoint(tmp_path / "source").tensor_keys() == [*CONFIG.shapes()]
